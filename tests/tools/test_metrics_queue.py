"""Pushing a finished run's late results to wandb, checked by wandb's own offline files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from helpers.slurm_cluster import wait_for
from spidr.config import read_config, to_dict
from spidr.tools.metrics import Line, read_metrics
from spidr.tools.metrics_queue import main
from spidr.tools.wandb import WandbMode, WandbSink


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run: training lines of steps 5 and 10, validation of step 0; results of 5 and 10 have just arrived."""
    for name in ("WANDB_ENTITY", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_DIR", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")  # instead of the network
    settings = {"workdir": str(tmp_path), "wandb_project": "p", "wandb_name": "n", "model_type": "spidr"}
    (tmp_path / "c.json").write_text(json.dumps({"run": settings, "data": {"manifest": "m.csv"}}))
    config = read_config(tmp_path / "c.json")
    folder = config.run.dir
    (folder / "validation").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    lines = [("dev", 0), ("train", 5), ("train", 10)]
    text = "".join(f'{{"step": {step}, "group": "{group}", "loss": {step / 10}}}\n' for group, step in lines)
    (folder / "metrics.jsonl").write_text(text)
    for step in (10, 5):
        (folder / f"validation/step_{step}.jsonl").write_text(
            f'{{"step": {step}, "group": "dev", "loss": {step / 10}}}\n'
        )
    return folder


def records(path: Path) -> Iterator[Record]:
    """The records of a .wandb file: a LevelDB log behind a header of 7 bytes."""
    raw, position, data = path.read_bytes(), 7, b""
    while position + 7 <= len(raw):
        if (room := 32768 - position % 32768) < 7:  # padding at the end of a block
            position += room
            continue
        length, kind = int.from_bytes(raw[position + 4 : position + 6], "little"), raw[position + 6]
        if position + 7 + length > len(raw):
            return  # still being written
        data += raw[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(data)
            data = b""


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """The contents of wandb's offline files, in the order of logging."""
    rows = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for record in records(path):
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if items:
                rows.append({key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
    return rows


def assert_logged(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    """Check what wandb has; its service may write shortly after a run has finished."""
    assert wait_for(lambda: logged(run_dir) == rows, 200), logged(run_dir)


def row(group: str, step: int) -> dict[str, float]:
    return {f"{group}/step": step, f"{group}/loss": step / 10}


def test_pushes_in_step_order_and_only_once(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_dir), "--entity", "team", "--runid", "abc"]) == 0
    assert capsys.readouterr().out == "5 lines pushed\n"
    rows = [row("dev", 0), row("train", 5), row("dev", 5), row("train", 10), row("dev", 10)]
    assert_logged(run_dir, rows)
    assert len(list(run_dir.glob("wandb/offline-run-*-abc*"))) == 1
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl") if line["group"] == "dev"] == [0, 5, 10]

    # The folder now knows the run. Nothing is left to push until another result arrives.
    assert main([str(run_dir / "metrics.jsonl"), "--entity", "team"]) == 0
    assert capsys.readouterr().out == "0 lines pushed: wandb has all of them\n"
    (run_dir / "validation/step_15.jsonl").write_text('{"step": 15, "group": "dev", "loss": 1.5}\n')
    assert main([str(run_dir), "--entity", "team"]) == 0
    assert_logged(run_dir, [*rows, row("dev", 15)])


def test_collects_without_wandb(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    for lines in (2, 0):
        assert main([str(run_dir)]) == 0
        assert capsys.readouterr().out.startswith(f"{lines} lines collected")
        steps = [(line["group"], line["step"]) for line in read_metrics(run_dir / "metrics.jsonl")]
        assert steps == [("dev", 0), ("train", 5), ("train", 10), ("dev", 5), ("dev", 10)]
    assert not (run_dir / "wandb.json").exists()


def test_pending_results_are_reported(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / "validation/step_7.pending").write_text('{"checkpoint": "step_7.pt", "job": "12"}')
    monkeypatch.setenv("PATH", "")  # no SLURM to ask
    assert main([str(run_dir), "--entity", "team", "--runid", "abc"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "4 lines pushed\n"
    assert captured.err == "not validated yet: steps 7; run this again later\n"


class Api:
    """wandb's API without a network, for a project with runs ``found``."""

    def __init__(self, *found: SimpleNamespace) -> None:
        self.found = found

    def runs(self, path: str, filters: dict[str, str]) -> list[SimpleNamespace]:
        assert (path, filters) == ("team/p", {"display_name": "n", "state": "finished"})
        return list(self.found)


FAKE_WANDB = """
import json, os
class Settings:
    def __init__(self, **settings): pass
class Run:
    def __init__(self, mode, summary): self.mode, self.summary = mode, summary
    def define_metric(self, *names, **options): pass
    def log(self, row): open(os.environ["PUSHED"], "a").write(json.dumps([self.mode, row]) + "\\n")
    def finish(self): pass
def init(*, mode, id, **options):
    return Run(mode, json.loads(os.environ.get("SUMMARY", "{}")) if mode == "online" else {})
class Api:
    def runs(self, path, filters): return [type("Found", (), {"id": "old"})]
"""


@pytest.fixture
def pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[tuple[str, str, int]]]]:
    """A wandb that can be online. Calls return what has arrived since the last one: mode, group, step."""
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PUSHED", str(tmp_path / "pushed"))
    monkeypatch.setenv("WANDB_MODE", "")
    real = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "wandb"}
    for name in real:
        del sys.modules[name]

    def take() -> list[tuple[str, str, int]]:
        path = tmp_path / "pushed"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        path.write_text("")
        return [(mode, *key.split("/")[:1], row[key]) for mode, row in lines for key in row if key.endswith("/step")]

    yield take
    sys.modules.pop("wandb", None)
    sys.modules.update(real)


def test_offline_run_goes_online(
    run_dir: Path, pushed: Callable[[], list[tuple[str, str, int]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """All lines are pushed, whatever was pushed offline; a run resumed online then pushes only new lines."""
    run = read_config(run_dir / "config.json").run
    lines = read_metrics(run_dir / "metrics.jsonl")

    def train(mode: WandbMode, lines: list[Line]) -> None:
        sink = WandbSink(run_dir, run.wandb_project, run.wandb_name, mode, {})
        for line in lines:
            sink.push(line)
        sink.close()

    train("offline", lines)
    assert [mode for mode, _, _ in pushed()] == ["offline"] * 3
    assert main([str(run_dir), "--entity", "team"]) == 0
    assert pushed() == [("online", *x) for x in [("dev", 0), ("train", 5), ("dev", 5), ("train", 10), ("dev", 10)]]
    train("online", [*read_metrics(run_dir / "metrics.jsonl"), {"step": 15, "group": "train", "loss": 1.5}])
    assert pushed() == [("online", "train", 15)]


def test_a_folder_without_a_run_id_asks_wandb(
    run_dir: Path, pushed: Callable[[], list[tuple[str, str, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUMMARY", json.dumps({"train/step": 10, "train/loss": 1.0, "dev/step": 0}))
    assert main([str(run_dir), "--entity", "team"]) == 0
    assert pushed() == [("online", "dev", 5), ("online", "dev", 10)]
    assert json.loads((run_dir / "wandb.json").read_text())["id"] == "old"
    assert main([str(run_dir), "--entity", "team"]) == 0
    assert pushed() == []


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WANDB_MODE": "disabled"}, "disables wandb"),
        ({"WANDB_DISABLED": "true"}, "disables wandb"),
        ({"WANDB_MODE": "maybe"}, "WANDB_MODE is 'maybe', not online, offline or disabled"),
    ],
)
def test_wandb_s_own_variables_are_respected(
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    message: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main([str(run_dir), "--entity", "team", "--runid", "x"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"id": ', "[]", '{"id": "x", "pushed": {"online": {"train": "x"}}}'])
def test_damaged_state_is_named_and_replaced(run_dir: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    (run_dir / "wandb.json").write_text(text)
    assert main([str(run_dir), "--entity", "team"]) == 0
    assert "wandb.json is damaged and is replaced" in caplog.text
    assert json.loads((run_dir / "wandb.json").read_text())["pushed"]["offline"]["train"] == [10]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "error: wandb, team/p: expected one finished run 'n', found none; give --runid"),
        ([SimpleNamespace(id="a"), SimpleNamespace(id="b")], "found a, b; give --runid"),
    ],
)
def test_ambiguous_run(
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: list[SimpleNamespace],
    message: str,
) -> None:
    monkeypatch.setattr("wandb.Api", lambda: Api(*found))
    monkeypatch.setenv("WANDB_MODE", "online")
    assert main([str(run_dir), "--entity", "team"]) == 2
    assert message in capsys.readouterr().err


def test_wrong_input(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--entity", "team"]) == 2
    assert f"error: {tmp_path}: not a run folder" in capsys.readouterr().err
    assert main([str(run_dir), "--entity", "team"]) == 2
    assert "no wandb run is known here; give --runid" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(run_dir), "--runid", "abc"])
    assert "--runid needs --entity" in capsys.readouterr().err

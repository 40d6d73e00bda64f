"""A run's folder: contents, resuming older ones, wandb, profiling, validation in jobs."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from helpers.processes import Fault, Ranks, assert_same_run, differences, outcome
from helpers.slurm_cluster import wait_for
from helpers.tiny_run import MEASURED, write_config, write_recordings
from spidr import run as run_module
from spidr.checkpoint import CONTENTS, read_checkpoint
from spidr.config import Config, read_config
from spidr.environment import Preempted
from spidr.models import DinoSR
from spidr.tools import profiler, wandb
from spidr.tools.errors import InputError
from spidr.tools.lock import Process
from spidr.tools.metrics import read_metrics
from spidr.train import Hooks, State, train
from spidr.validation_jobs import ValidationJobs

LAYERS = ("l2", "l3", "l4")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("data") / "recordings", count=12)


def stop_at(step: int) -> Hooks:
    def after_step(state: State) -> None:
        if state.step == step - 1:  # all processes learn about it in the next step
            state.stop.set(10)

    return Hooks(after_step=after_step)


def test_folder_of_a_run(tmp_path: Path, manifest: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level, list(logging.getLogger("spidr").handlers), Path.cwd())
    cfg = read_config(
        write_config(
            tmp_path,
            manifest,
            run={"save_interval": 4, "keep_latest": 1, "log_interval": 3},
            optimizer={"max_steps": 7},
        )
    )
    train(cfg)
    assert before == (list(root.handlers), root.level, list(logging.getLogger("spidr").handlers), Path.cwd())
    assert sorted(path.name for path in cfg.run.dir.iterdir()) == [
        "config.json", "data.json", "final.pt", "log_0.txt", "metrics.jsonl", "step_4.pt"
    ]  # fmt: skip
    assert read_config(cfg.run.dir / "config.json") == cfg
    assert json.loads((cfg.run.dir / "data.json").read_text())["recordings"] == 12
    log = (cfg.run.dir / "log_0.txt").read_text()
    assert "training spidr: new in" in log
    assert "finished 7 steps" in log
    lines = read_metrics(cfg.run.dir / "metrics.jsonl")
    assert [(line["step"], line["group"]) for line in lines] == [
        (0, "dev"), (3, "train"), (4, "dev"), (6, "train"), (7, "train"), (7, "dev")
    ]  # fmt: skip
    per_codebook = {f"{name}_{layer}" for name in ("target_ppl", "pred_ppl") for layer in LAYERS}
    assert lines[0].keys() == {"step", "group", "loss", "target_ppl", "pred_ppl"} | per_codebook
    assert lines[1].keys() == MEASURED | per_codebook | {f"active_codewords_{layer}" for layer in LAYERS} | {
        "step", "group", "epoch", "loss", "grad_norm", "batch_size", "skipped_files", "target_ppl", "pred_ppl", "lr",
        "ema_decay",
    }  # fmt: skip
    assert 0 <= lines[1]["data_wait_share"] <= 1
    assert lines[1]["audio_seconds_per_second"] > 0
    assert lines[1]["tflops"] > 0
    checkpoint = torch.load(cfg.run.dir / "final.pt", weights_only=True)
    assert checkpoint.keys() == CONTENTS.keys() | {"position", "means", "idle"}

    finished = (cfg.run.dir / "final.pt").stat().st_mtime_ns
    train(cfg)  # nothing left to do
    assert (cfg.run.dir / "final.pt").stat().st_mtime_ns == finished
    assert read_metrics(cfg.run.dir / "metrics.jsonl") == lines


def test_skipped_files_are_counted(tmp_path: Path) -> None:
    manifest = write_recordings(tmp_path / "recordings", count=12)
    gone = manifest.parent / "audio" / "3.wav"
    gone.unlink()
    cfg = read_config(write_config(tmp_path, manifest, data={"on_error": "skip"}))
    cfg = replace(cfg, validation={})
    train(cfg)
    lines = read_metrics(cfg.run.dir / "metrics.jsonl")
    assert {line["skipped_files"] for line in lines} == {0, 1}
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert (cfg.run.dir / "log_0.txt").read_text().count(f"Skipped: {gone}: the file does not exist") == 1


def test_longer_training_resumes_from_the_end(tmp_path: Path, manifest: Path) -> None:
    train(read_config(write_config(tmp_path, manifest, optimizer={"max_steps": 3, "scheduler": "constant"})))
    cfg = read_config(write_config(tmp_path, manifest, optimizer={"max_steps": 5, "scheduler": "constant"}))
    train(cfg)
    whole = read_config(write_config(tmp_path, manifest, "whole", optimizer={"max_steps": 5, "scheduler": "constant"}))
    train(whole)
    found, expected = (torch.load(c.run.dir / "final.pt", weights_only=True) for c in (cfg, whole))
    assert differences(found, expected) == []


def test_no_checkpoints(tmp_path: Path, manifest: Path) -> None:
    cfg = read_config(write_config(tmp_path, manifest, run={"save_interval": 0}, optimizer={"max_steps": 3}))
    train(cfg)
    assert not list(cfg.run.dir.glob("*.pt"))
    assert [line["step"] for line in read_metrics(cfg.run.dir / "metrics.jsonl") if line["group"] == "dev"] == [0, 3]


def test_folder_of_version_0_1_2(tmp_path: Path, manifest: Path) -> None:
    """It has weights, optimizer, step and epoch, but no data position: training resumes with the next epoch."""
    cfg = read_config(write_config(tmp_path, manifest, optimizer={"max_steps": 12}, run={"save_interval": 100}))
    with pytest.raises(Preempted):
        train(cfg, stop_at(4))
    path = cfg.run.dir / "step_4.pt"
    saved = torch.load(path, weights_only=True)
    torch.save({key: saved[key] for key in CONTENTS}, path)
    (cfg.run.dir / "metrics.jsonl").write_text(
        '{"step": 3, "group": "dev", "loss": 2.5, "target_ppl": 3, "pred_ppl": 4}\n'
    )
    seen: list[tuple[int, int, int]] = []
    train(cfg, Hooks(after_step=lambda state: seen.append((state.step, state.epoch, state.position))))
    assert seen[0] == (5, saved["epoch"] + 1, 1)
    assert seen[-1][0] == 12
    log = (cfg.run.dir / "log_0.txt").read_text()
    assert "step_4.pt does not say which data it had seen: resuming with the next epoch" in log
    lines = read_metrics(cfg.run.dir / "metrics.jsonl")
    assert lines[0]["step"] == 3
    assert [line["step"] for line in lines if line["group"] == "train"] == list(range(5, 13))


def test_damaged_checkpoint_costs_only_time(tmp_path: Path, manifest: Path) -> None:
    sections: dict[str, Any] = {"optimizer": {"max_steps": 9}, "run": {"save_interval": 3}}
    whole = read_config(write_config(tmp_path, manifest, "whole", **sections))
    train(whole)
    cfg = read_config(write_config(tmp_path, manifest, "damaged", **sections))
    shutil.copytree(whole.run.dir, cfg.run.dir)
    (cfg.run.dir / "final.pt").unlink()
    (cfg.run.dir / "step_9.pt").write_bytes(b"")
    content = bytearray((cfg.run.dir / "step_6.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (cfg.run.dir / "step_6.pt").write_bytes(content)
    with (cfg.run.dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "gro')
    (cfg.run.dir / f".spidr-{Process.current().machine}-{os.getpid()}-1-0.tmp").write_bytes(b"of a killed process")
    train(cfg)
    assert_same_run(cfg.run.dir, whole.run.dir)
    log = (cfg.run.dir / "log_0.txt").read_text()
    assert log.count("WARNING passed over a checkpoint") == 2
    assert f"resuming from {cfg.run.dir / 'step_3.pt'}" in log


def test_checkpoint_that_cannot_be_used_is_an_error(tmp_path: Path, manifest: Path) -> None:
    train(read_config(write_config(tmp_path, manifest, optimizer={"max_steps": 1})))
    cfg = read_config(write_config(tmp_path, manifest, model={"encoder_num_layers": 3}))
    with pytest.raises(InputError, match=r"encoder_num_layers = 4 there, 3 here.*another run\.wandb_name"):
        train(cfg)


def test_two_steps_are_profiled(tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "FIRST_STEP", 2)
    cfg = read_config(write_config(tmp_path, manifest, run={"profile": True}, optimizer={"max_steps": 5}))
    train(cfg)
    assert "train_step" in (cfg.run.dir / "trace.html").read_text()


class Jobs(ValidationJobs):
    """Replaces submission: the test writes the results."""

    submitted: ClassVar[list[tuple[int, str]]] = []

    def submit(self, cfg: Config, step: int, checkpoint: Path) -> None:
        self.submitted.append((step, checkpoint.name))
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"step_{step}.pending").write_text(json.dumps({"checkpoint": str(checkpoint), "job": "1"}))

    def find_lost(self) -> None:
        pass


def test_validation_in_jobs(tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "ValidationJobs", Jobs)
    monkeypatch.setenv("SLURM_STEP_ID", "none")  # validation believes it runs in a job
    cfg = read_config(
        write_config(tmp_path, manifest, run={"save_interval": 2, "keep_latest": 1}, optimizer={"max_steps": 7})
    )
    results = [{"step": step, "group": "dev", "loss": 1.25 + step} for step in (0, 2)]

    def two_have_ended_at_step_5(state: State) -> None:
        if state.step == 5:
            for line in results:
                (cfg.run.dir / f"validation/step_{line['step']}.jsonl").write_text(json.dumps(line) + "\n")

    train(cfg, Hooks(after_step=two_have_ended_at_step_5))
    assert Jobs.submitted == [
        (0, "step_0.pt"),
        (2, "step_2.pt"),
        (4, "step_4.pt"),
        (6, "step_6.pt"),
        (7, "final.pt"),
    ]
    # Checkpoints of pending validations still exist.
    assert sorted(path.name for path in cfg.run.dir.glob("*.pt")) == ["final.pt", "step_4.pt", "step_6.pt"]
    assert [line for line in read_metrics(cfg.run.dir / "metrics.jsonl") if line["group"] == "dev"] == results


def test_wandb_gets_each_line_once_in_one_run(tmp_path: Path, manifest: Path) -> None:
    from tools.test_metrics_queue import records

    cfg = read_config(
        write_config(tmp_path, manifest, run={"wandb_mode": "offline", "save_interval": 2}, optimizer={"max_steps": 6})
    )
    with pytest.raises(Preempted):
        train(cfg, stop_at(3))
    first = json.loads((cfg.run.dir / "wandb.json").read_text())
    train(cfg)
    state = json.loads((cfg.run.dir / "wandb.json").read_text())
    assert state["id"] == first["id"]
    assert state["pushed"]["offline"] == {"train": [6], "dev": [-1, 0, 2, 4, 6]}
    sessions = sorted(cfg.run.dir.glob("wandb/offline-run-*/*.wandb"))
    assert {path.name for path in sessions} == {f"run-{state['id']}.wandb"}

    def logged() -> list[tuple[int, str]]:
        found = []
        for path in sessions:
            for record in records(path):
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                found += [(int(value), key) for key, value in items.items() if key.endswith("/step")]
        return found

    lines = read_metrics(cfg.run.dir / "metrics.jsonl")
    assert wait_for(lambda: len(logged()) >= len(lines), 200)  # wandb writes asynchronously
    assert logged() == [(line["step"], f"{line['group']}/step") for line in lines]


def test_unreachable_wandb_does_not_stop_training(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "TIMEOUT", 2.0)
    cfg = read_config(write_config(tmp_path, manifest, run={"wandb_mode": "online"}, optimizer={"max_steps": 2}))
    train(cfg)
    assert (cfg.run.dir / "final.pt").exists()
    log = (cfg.run.dir / "log_0.txt").read_text()
    assert re.search(r"WARNING wandb is not available \(.+\); training continues without it\n", log)
    assert "Traceback" not in log


@torch.no_grad()
def one_codeword_only(model: DinoSR) -> None:
    for codebook in model.codebooks:
        codebook.codebook[1:] += 1000


def test_collapse_gives_a_warning(tmp_path: Path, manifest: Path) -> None:
    run = {"collapse_share": 1.0, "collapse_steps": 2, "save_interval": 0}
    cfg = read_config(write_config(tmp_path, manifest, run=run, optimizer={"max_steps": 3}))
    train(cfg, Hooks(on_model=one_codeword_only))
    log = (cfg.run.dir / "log_0.txt").read_text()
    assert "step 2: the codebook of layer 2 has used less than 100 % of its 12 codewords for 2 steps" in log


# ------------------------------------------------------------------------------------------------ resuming and ending


def settings(tmp_path: Path, manifest: Path, **sections: dict[str, Any]) -> Config:
    sections["run"] = {"save_interval": 4} | sections.get("run", {})
    sections["optimizer"] = {"max_steps": 6} | sections.get("optimizer", {})
    return read_config(write_config(tmp_path, manifest, **sections))


def trained(run_dir: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run_dir / "metrics.jsonl") if line["group"] == "train"]


def test_a_finished_run_is_left_alone(tmp_path: Path, manifest: Path) -> None:
    cfg = settings(tmp_path, manifest)
    train(cfg)
    before = {path.name: path.read_bytes() for path in cfg.run.dir.iterdir() if path.suffix in (".json", ".pt")}
    for section, changes, message in [
        ("run", {"model_type": "dinosr"}, "run.model_type = spidr there, dinosr here"),
        ("optimizer", {"lr": 0.1}, "optimizer.lr = 0.0005 there, 0.1 here"),
        ("optimizer", {"max_steps": 5}, "optimizer.max_steps = 6 there, 5 here"),
        ("masking", {"mask_prob": 0.5}, "masking.mask_prob = 0.8 there, 0.5 here"),
        ("data", {"max_batch_length": 30_000}, "data.max_batch_length = 24000 there, 30000 here"),
        ("model", {"freeze_step": 3}, "model.freeze_step = 200000 there, 3 here"),
    ]:
        with pytest.raises(InputError, match=rf"holds a finished run with other settings: .*{re.escape(message)}"):
            train(settings(tmp_path, manifest, **{section: changes}))
    train(settings(tmp_path, manifest, run={"log_interval": 3}, data={"num_workers": 1}))
    assert before == {name: (cfg.run.dir / name).read_bytes() for name in before}


def test_changed_settings_are_listed(tmp_path: Path, manifest: Path) -> None:
    cfg = settings(tmp_path, manifest)
    train(cfg)
    train(settings(tmp_path, manifest, optimizer={"max_steps": 8, "lr": 0.1}, model={"freeze_step": 7}))
    log = (cfg.run.dir / "log_0.txt").read_text()
    assert (
        "changed since the run began: model.freeze_step = 200000 there, 7 here; optimizer.lr = 0.0005 there, 0.1 here; "
        "optimizer.max_steps = 6 there, 8 here"
    ) in log
    assert read_config(cfg.run.dir / "config.json").optimizer.lr == 0.1
    checkpoint, _ = outcome(cfg.run.dir)
    assert len(checkpoint["optimizer"]["param_groups"]) == 1
    # Frozen parameters become trainable again.
    train(settings(tmp_path, manifest, optimizer={"max_steps": 10}, model={"freeze_step": 100}))
    checkpoint, _ = outcome(cfg.run.dir)
    assert len(checkpoint["optimizer"]["param_groups"]) == 2


def test_the_last_interval_may_be_a_short_one(tmp_path: Path, manifest: Path) -> None:
    def logged(max_steps: int) -> list[int]:
        cfg = settings(tmp_path, manifest, run={"log_interval": 4}, optimizer={"max_steps": max_steps})
        train(cfg)
        return trained(cfg.run.dir)

    assert logged(3) == [3]
    assert logged(9) == [3, 4, 8, 9]


def test_nothing_is_written_if_no_checkpoint_is_usable(tmp_path: Path, manifest: Path) -> None:
    cfg = settings(tmp_path, manifest)
    train(cfg)
    for path in cfg.run.dir.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    os.mkfifo(cfg.run.dir / "step_9.pt")
    before = {path.name: path.read_bytes() for path in cfg.run.dir.iterdir() if path.is_file()}
    with pytest.raises(InputError, match="none of its checkpoints can be used, so nothing was changed"):
        train(cfg)
    assert before == {path.name: path.read_bytes() for path in cfg.run.dir.iterdir() if path.is_file()}


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 75)])
def test_second_start_and_a_stop_that_saves(tmp_path: Path, manifest: Path, signum: int, status: int) -> None:
    sections: dict[str, Any] = {"run": {"log_interval": 5}, "optimizer": {"max_steps": 8}}
    cfg = settings(tmp_path, manifest, **sections)
    undisturbed = replace(cfg, run=replace(cfg.run, wandb_name="undisturbed"))
    train(undisturbed)
    ranks = Ranks(tmp_path / "run.json", 1, Fault("step", 4, signal.SIGSTOP))
    pid = ranks.processes[0].pid
    assert pid is not None
    assert wait_for(lambda: Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] == "T", 200)
    with pytest.raises(InputError, match=rf"another process is training in this folder \(process {pid} on"):
        train(cfg)
    os.kill(pid, signum)
    os.kill(pid, signal.SIGCONT)
    assert ranks.wait() == [status]
    log = (cfg.run.dir / "log_0.txt").read_text()
    assert f"the run ended: stopped by {signal.Signals(signum).name}" in log
    assert trained(cfg.run.dir) == [4]  # the last measurements
    train(cfg)
    assert_same_run(cfg.run.dir, undisturbed.run.dir)


def test_the_log_says_why_a_run_ended(tmp_path: Path, manifest: Path) -> None:
    def fail(state: State) -> None:
        if state.step == 3:
            raise ZeroDivisionError("in a hook")

    cfg = settings(tmp_path, manifest, run={"log_interval": 2})
    with pytest.raises(ZeroDivisionError):
        train(cfg, Hooks(after_step=fail))
    log = (cfg.run.dir / "log_0.txt").read_text()
    assert "the run ended: ZeroDivisionError: in a hook" in log
    assert "Traceback" in log


def test_in_a_thread_and_with_other_defaults(tmp_path: Path, manifest: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Training restores what it changes in the caller's process."""
    cfg = settings(tmp_path, manifest, run={"use_deterministic": True}, optimizer={"max_steps": 2})
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(train, cfg).result()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    assert "training runs in a thread: signals" in (cfg.run.dir / "log_0.txt").read_text()
    assert read_checkpoint(cfg.run.dir / "final.pt")["model"]["mask_embedding"].dtype == torch.float32

"""The command line: what it refuses, what it would submit, and local training."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.slurm_cluster import wait_for
from helpers.tiny_run import assert_same_outcome, write_config, write_recordings
from spidr import __main__ as command_line, __version__
from spidr.__main__ import main
from spidr.config import read_config
from spidr.models import build_model
from spidr.tools.metrics import read_metrics

ON_SLURM = ["-A", "me", "-N", "2", "-G", "4"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("SPIDR_CLUSTER", "SPIDR_CLUSTERS_FILE", "SPIDR_SUBMITIT_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return write_config(tmp_path, write_recordings(tmp_path / "data", count=6))


def spidr(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spidr", *args], capture_output=True, text=True, timeout=250, check=False, **options
    )


def test_programs_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr()
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"spidr {__version__}\n"
    for name in ("evaluate", "export", "extract", "manifest", "metrics", "models", "report"):
        assert name in shown.out
    assert len(shown.out.splitlines()) <= 48
    assert "\nexample:\n  python -m spidr config.toml " in shown.out


@pytest.mark.parametrize(
    ("arguments", "begin"),
    [
        (["train", "--help"], "usage: spidr train [options]"),
        (["--help"], "usage: spidr train [options]"),
        (["manifest", "--help"], "usage: spidr manifest [options]"),
        (["extract", "units", "--help"], "usage: spidr extract units [options]"),
        (["metrics", "--help"], "usage: spidr metrics [options]"),
    ],
)
def test_console_script(tmp_path: Path, arguments: list[str], begin: str) -> None:
    script = tmp_path / "spidr"
    script.write_text(f"#!{sys.executable}\nfrom spidr.__main__ import spidr\nspidr()\n")
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, timeout=250, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(begin)


def test_console_script_has_the_command_s_status(config: Path, tmp_path: Path) -> None:
    code = "import sys; sys.argv[0] = 'spidr'; from spidr.__main__ import spidr; spidr()"
    command = [sys.executable, "-c", code, "metrics", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 2
    assert "not a run folder" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dry-run"], "the following arguments are required: CONFIG"),
        (["CONFIG", "-A", "me"], "SLURM needs -N and -G together"),
        (["CONFIG", "-A", "me", "-G", "4"], "SLURM needs -N and -G together"),
        (["CONFIG", "-t", "60"], "SLURM needs -N and -G together"),
        (["CONFIG", "--dump", "x"], "SLURM needs -N and -G together"),
        (["optimizer.lr=1"], "no configuration is given"),
        (["CONFIG", *ON_SLURM, "-t", "soon"], "argument -t/--time: invalid int value: 'soon'"),
    ],
)
def test_wrong_usage(config: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(config) if option == "CONFIG" else option for option in options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["CONFIG", "missing.toml"], "error: missing.toml: cannot be read (No such file or directory)"),
        (["CONFIG", "CONFIG2"], "both train in"),
        (["CONFIG", *ON_SLURM], "error: no folder for the job: give --dump or set SPIDR_SUBMITIT_FOLDER"),
        (["CONFIG", *ON_SLURM, "--dump", "DUMP", "-t", "0"], "time: found 0, accepted: an integer of at least 1"),
        (
            ["CONFIG", *ON_SLURM, "--dump", "DUMP", "-C", ""],
            "constraint: found '', accepted: a string that is not empty",
        ),
        (["CONFIG", *ON_SLURM, "--dump", "DUMP/run%j"], "%j has a meaning of its own in SLURM's paths"),
    ],
)
def test_wrong_input(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    same_run = tmp_path / "same_run.json"
    same_run.write_text(config.read_text("utf-8"))
    named = {"CONFIG": config, "CONFIG2": same_run, "DUMP": tmp_path / "dump"}
    before = sorted(tmp_path.rglob("*"))
    options = [next((o.replace(k, str(v)) for k, v in named.items() if o.split("/")[0] == k), o) for o in options]
    assert main(options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lone_process_reports_errors_whatever_its_local_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """LOCAL_RANK may be left over from another program."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["missing.toml"]) == 2
    assert "missing.toml: cannot be read" in capsys.readouterr().err


def test_dry_run_shows_the_exact_submission(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    other = write_config(tmp_path, tmp_path / "data/manifest.csv", "other")
    options = ["-c", "3", "--mem-per-gpu", "80g", "-t", "90", "-C", "a&b", "-p", "p1", "-q", "q1"]
    assert main([str(config), str(other), *ON_SLURM, *options, "--dump", str(tmp_path / "my dump"), "--dry-run"]) == 0
    first, *script = capsys.readouterr().out.splitlines()
    folder = tmp_path / "my dump" / "run"
    assert first == (
        f"sbatch --parsable --requeue --open-mode=append '--output={folder}/%A_%a_slurm.log' --job-name=run "
        "--account=me --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=3 --mem-per-gpu=80g --time=90 "
        "'--constraint=a&b' --partition=p1 --qos=q1 --array=0-1 --signal=USR2@120 <<'EOF'"
    )
    assert script[0] == "#!/bin/bash"
    assert script[-1] == "EOF"
    assert sorted(tmp_path.rglob("*")) == sorted([*before, other])


def test_command_of_discophon_s_page(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No account, long option names, a time limit in minutes."""
    words = "--nodes 4 --gpus-per-node 4 --cpus-per-task 24 --time 1200 --constraint h100 --dump dump".split()  # noqa: SIM905
    assert main([str(config), *words, "--dry-run"]) == 0
    assert (
        "--job-name=run --nodes=4 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=24 --time=1200 "
        "--constraint=h100 --signal=USR2@120"
    ) in capsys.readouterr().out


def test_everything_is_checked_first(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything missing is reported at once, locally and on SLURM, with and without --dry-run."""
    missing = {"a": {"manifest": str(tmp_path / "no.csv")}, "b": {"alignments_path": str(tmp_path / "no.jsonl")}}
    missing["b"] |= {"manifest": str(tmp_path / "data/manifest.csv")}
    run = {"init_ckpt": str(tmp_path / "no.pt")}
    other = write_config(tmp_path, tmp_path / "data/manifest.csv", "other", validation=missing, run=run)
    on_slurm = [*ON_SLURM, "--dump", str(tmp_path / "dump")]
    assert main([str(config), "--dry-run"]) == 0
    (tmp_path / "data/audio/3.wav").unlink()
    for options in (["--dry-run"], ["--dry-run", *on_slurm], on_slurm):
        assert main([str(config), str(other), *options]) == 2
        said = capsys.readouterr().err
        for problem in (
            f"{tmp_path}/no.pt: ",
            f"{tmp_path}/no.csv: the manifest does not exist",
            f"{tmp_path}/no.jsonl: ",
            f"data/manifest.csv: 1 of 6 files do not exist: {tmp_path}/data/audio/3.wav",
        ):
            assert said.count(problem) == 1, said
    assert not (tmp_path / "dump").exists()
    assert not (tmp_path / "p").exists()


def test_initial_weights_must_fit(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All weights, or all but the teacher's."""
    cfg = read_config(config)
    weights = build_model(cfg=cfg.model, model_type=cfg.run.model_type).state_dict()
    for name, left_out, status in (("whole.pt", "none", 0), ("export.pt", "teacher", 0), ("part.pt", "student", 2)):
        kept = {key: value for key, value in weights.items() if not key.startswith(left_out)}
        torch.save(kept, tmp_path / name)
        assert main([str(config), f"run.init_ckpt={tmp_path}/{name}", "--dry-run"]) == status
    assert re.search(r"part\.pt: not the weights of this \w+: missing: student", capsys.readouterr().err)


def test_lengths_of_some_recordings_are_compared(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(tmp_path / "data/audio/1.wav", tmp_path / "data/audio/0.wav")
    assert main([str(config), "--dry-run"]) == 2
    assert re.search(r"audio/0.wav has [\d,]+ samples, not [\d,]+: write the manifest again", capsys.readouterr().err)


def dry_run(config: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The printed sbatch command line, or the error."""
    main([str(config), *ON_SLURM, "--dump", str(config.parent / "dump"), "--dry-run", *options])
    captured = capsys.readouterr()
    return captured.out.partition("<<")[0] or captured.err


def test_presets(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--time" not in dry_run(config, capsys)
    for name, options in {
        "JZ_V100": "--cpus-per-task=10 --time=1200 --signal",
        "JZ_A100": "--cpus-per-task=8 --time=1200 --constraint=a100 --signal",
        "JZ_H100": "--cpus-per-task=24 --time=1200 --constraint=h100 --signal",
        "FAIR_AWS_A100": "--cpus-per-task=12 --mem-per-gpu=80g --time=4320 --signal",
    }.items():
        monkeypatch.setenv("SPIDR_CLUSTER", name)
        assert options in dry_run(config, capsys)
    assert "--cpus-per-task=2 --mem-per-gpu=80g --time=4320" in dry_run(config, capsys, "-c", "2")
    # A preset is not a SLURM option: without -A, -N and -G, training is local.
    assert main([str(config), "--dry-run"]) == 0
    assert f"{config}: trains here, in {tmp_path}/p/run" in capsys.readouterr().out


def test_own_presets(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "home/.config/spidr/clusters.toml"
    own.parent.mkdir(parents=True)
    own.write_text('[HERE]\npartition = "big"\n[JZ_A100]\ntime = 60\n')
    monkeypatch.setenv("SPIDR_CLUSTER", "HERE")
    assert "--partition=big" in dry_run(config, capsys)
    monkeypatch.setenv("SPIDR_CLUSTER", "JZ_A100")
    assert "--cpus-per-task=8 --time=60 --constraint=a100" in dry_run(config, capsys)
    monkeypatch.setenv("SPIDR_CLUSTER", "NOWHERE")
    known = "FAIR_AWS_A100, HERE, JZ_A100, JZ_H100, JZ_V100"
    assert f"error: SPIDR_CLUSTER: no cluster 'NOWHERE' in {own}; known: {known}" in dry_run(config, capsys)

    given = tmp_path / "given.toml"
    given.write_text("NOTHING = 1\n")
    monkeypatch.setenv("SPIDR_CLUSTERS_FILE", str(given))
    assert f"error: {given}: NOTHING: found 1, accepted: a table" in dry_run(config, capsys)
    given.write_text("[NOWHERE]\nnodes = 3\n")
    assert f"error: {given}: NOWHERE.nodes: unknown key, accepted: time, cpus_per_task" in dry_run(config, capsys)
    given.write_text('[NOWHERE]\ntime = "long"\n')
    assert "time: found 'long', accepted: an integer" in dry_run(config, capsys)
    monkeypatch.setenv("SPIDR_CLUSTERS_FILE", str(tmp_path / "no.toml"))
    assert "no.toml: cannot be read" in dry_run(config, capsys)


def test_dump_folder_from_the_environment(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPIDR_SUBMITIT_FOLDER", str(tmp_path / "jobs"))
    assert main([str(config), *ON_SLURM, "--dry-run"]) == 0
    assert f"--output={tmp_path}/jobs/run/%j_slurm.log" in capsys.readouterr().out


def test_a_run_that_fails_does_not_stop_the_others(config: Path, tmp_path: Path) -> None:
    nowhere = write_config(tmp_path, tmp_path / "no.csv", "nowhere")
    done = spidr(str(nowhere), str(config), "optimizer.max_steps=2", "run.save_interval=0")
    assert done.returncode == 2
    assert f"error: {tmp_path}/no.csv: the manifest does not exist" in done.stderr
    assert read_metrics(tmp_path / "p/run/metrics.jsonl")[-1]["step"] == 2


def test_overrides(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = ["run.wandb_name=x", "--dry-run", "run.wandb_project = 'a b'"]
    assert main([str(config), *named]) == 0
    assert capsys.readouterr().out == f"{config}: trains here, in {tmp_path}/a b/x\n"
    assert main([str(config), "optimizer.lrr=1e-3", "optimizer.lr=-1", "optimizer.dtype=int8"]) == 2
    said = capsys.readouterr().err
    assert "3 problems" in said
    assert "optimizer.lrr: unknown key, did you mean lr?" in said


def test_trains_one_configuration_after_the_other(config: Path, tmp_path: Path) -> None:
    short = {"max_steps": 3}
    paths = [write_config(tmp_path, tmp_path / "data/manifest.csv", name, optimizer=short) for name in ("a", "b")]
    done = spidr(*map(str, paths))
    assert done.returncode == 0, done.stderr
    assert_same_outcome(tmp_path / "p/a", tmp_path / "p/b")


def test_one_process_per_gpu(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(command_line, "_train_on_gpus", lambda words, count: calls.append((words[0], count)) or 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    auto = write_config(tmp_path, tmp_path / "data/manifest.csv", "auto", run={"device": "auto"})
    assert main([str(auto)]) == 0
    assert calls == [(str(auto), 4)]
    # As one of several processes, or told to use the CPU, it trains in this process.
    monkeypatch.setattr("spidr.train.train", lambda cfg: calls.append((cfg.run.wandb_name, 1)))
    assert main([str(config)]) == 0
    monkeypatch.setenv("RANK", "0")
    assert main([str(auto)]) == 2
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main([str(auto)]) == 0
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    for name, value in (("STEP_ID", "0"), ("PROCID", "0"), ("LOCALID", "0"), ("NTASKS", "4")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert main([str(auto)]) == 0
    assert calls[1:] == [("run", 1), ("auto", 1), ("auto", 1)]


def test_the_command_ends_with_the_status_of_its_processes(config: Path) -> None:
    document = json.loads(config.read_text("utf-8"))
    document["data"]["manifest"] = "gone.csv"
    config.write_text(json.dumps(document), encoding="utf-8")
    code = f"import sys; from spidr.__main__ import _train_on_gpus; sys.exit(_train_on_gpus([{str(config)!r}], 2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 2
    assert "error: gone.csv: the manifest does not exist" in done.stderr


def test_another_signal_at_the_end_does_not_change_the_status(config: Path, tmp_path: Path) -> None:
    """Python takes a while to end, and srun kills tasks as soon as one has ended."""
    long = write_config(tmp_path, tmp_path / "data/manifest.csv", "long", optimizer={"max_steps": 100_000})
    ending, told = tmp_path / "ending", tmp_path / "told"
    code = f"""
import atexit, pathlib, time
@atexit.register
def end():
    pathlib.Path({str(ending)!r}).touch()
    while not pathlib.Path({str(told)!r}).exists():
        time.sleep(0.1)
"""
    (tmp_path / "sitecustomize.py").write_text(code, encoding="utf-8")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *map(os.path.abspath, sys.path)])}
    command = [sys.executable, "-m", "spidr.train", str(long)]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE) as process:
        assert wait_for(lambda: len(read_metrics(tmp_path / "p/long/metrics.jsonl")) > 3, 200)
        process.terminate()
        assert wait_for(ending.exists, 200)
        process.terminate()
        told.touch()
        _, errors = process.communicate(timeout=250)
    assert process.returncode == 75, errors


def test_processes_have_time_to_save_when_the_command_is_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    name, seen = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", []
    monkeypatch.setenv(name, "")  # so that it is restored
    monkeypatch.delenv(name)
    monkeypatch.setattr("torch.distributed.run.main", lambda _: seen.append(os.environ[name]))
    assert command_line._train_on_gpus([], 2) == 0
    assert seen == ["600"]


@pytest.mark.slow
def test_all_processes_save_when_the_command_is_told_to_stop(config: Path, tmp_path: Path) -> None:
    long = write_config(tmp_path, tmp_path / "data/manifest.csv", "long", optimizer={"max_steps": 100_000})
    code = f"from spidr.__main__ import _train_on_gpus; _train_on_gpus([{str(long)!r}], 2)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        run_dir = tmp_path / "p/long"
        assert wait_for(lambda: len(read_metrics(run_dir / "metrics.jsonl")) > 3, 200)
        process.terminate()
        _, errors = process.communicate(timeout=250)
    assert process.returncode == 128 + signal.SIGTERM, errors
    last = read_metrics(run_dir / "metrics.jsonl")[-1]["step"]
    assert (run_dir / f"step_{last}.pt").exists()


def test_one_line_for_a_wrong_manifest(config: Path, tmp_path: Path) -> None:
    (tmp_path / "data/manifest.csv").write_text("no,columns\na,b\n")
    done = spidr(str(config))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/data/manifest.csv: ")
    assert "Traceback" not in done.stderr

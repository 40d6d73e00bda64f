"""Validation in separate jobs: bookkeeping in files, failures, and jobs on a real SLURM."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from helpers.slurm_cluster import Cluster, logs, wait_for
from helpers.tiny_run import write_config, write_recordings
from spidr import validation_jobs
from spidr.config import Config, ResumeConfig, SlurmConfig, read_config
from spidr.models import build_model
from spidr.slurm import validation_job_config
from spidr.tools.metrics import read_metrics
from spidr.train import Hooks, State, train
from spidr.validate import validate_existing_checkpoint
from spidr.validation_jobs import ValidationJobs, main, validates_in_jobs

ONE_TASK = SlurmConfig(account="a", nodes=1, gpus_per_node=1, time=60)


def test_settings_of_validation_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_JOB_ACCOUNT", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    cfg = read_config(write_config(tmp_path, tmp_path / "m.csv"))
    own = read_config(write_config(tmp_path, tmp_path / "m.csv", run={"slurm_validation": vars(ONE_TASK)}))
    assert not validates_in_jobs(cfg)
    assert validates_in_jobs(own)
    with pytest.raises(ValueError, match="not in a SLURM job"):
        validation_job_config()
    for name, value in {"JOB_ID": "7", "STEP_ID": "0", "JOB_ACCOUNT": "abc@h100", "CPUS_PER_TASK": "24"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert validates_in_jobs(cfg)
    expected = SlurmConfig(account="abc@h100", nodes=1, gpus_per_node=1, time=60, cpus_per_task=24)
    assert validation_job_config() == expected
    monkeypatch.delenv("SLURM_JOB_ACCOUNT")
    assert validation_job_config() == replace(expected, account=None)


def put(folder: Path, step: int, suffix: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"step_{step}{suffix}").write_text(text)


def test_results_are_collected_in_the_order_of_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "validation"

    def results(step: int) -> None:
        put(folder, step, ".jsonl", "".join(f'{{"step": {step}, "group": "{g}"}}\n' for g in "ab"))

    for step in (100, 200, 1000):
        put(folder, step, ".pending", "1")  # as earlier versions wrote it
    jobs = ValidationJobs(tmp_path)
    results(0)
    results(200)
    assert jobs.pending() == {100, 1000}
    assert list(jobs.collect()) == [{"step": 0, "group": "a"}, {"step": 0, "group": "b"}]
    assert list(jobs.collect()) == []
    put(folder, 1000, ".failed", '{"reason": "why"}')
    for _ in range(2):
        jobs.report()
    assert jobs.failures() == {1000: "why"}
    assert [record.getMessage() for record in caplog.records] == ["step 1000 is not validated: why"]
    results(100)
    lines = jobs.collect()
    assert [next(lines) for _ in range(3)][-1] == {"step": 200, "group": "a"}
    lines.close()  # as if the process died here
    assert [line["step"] for line in ValidationJobs(tmp_path).collect()] == [200, 200]
    assert (jobs.pending(), jobs.needed()) == (set(), {1000})
    results(1000)  # it was repeated
    assert len(list(jobs.collect())) == 2
    assert list(folder.iterdir()) == []


def test_results_that_are_collected_while_their_job_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job may be done before a slow sbatch has answered."""
    cfg = read_config(write_config(tmp_path, tmp_path / "m.csv", run={"slurm_validation": vars(ONE_TASK)}))
    jobs, collected, write = ValidationJobs(tmp_path), list[dict[str, Any]](), validation_jobs.write_json
    collector = Thread(target=lambda: collected.extend(jobs.collect()))

    def submit(*_: Any, **__: Any) -> tuple[str, Path]:
        put(jobs.folder, 5, ".jsonl", '{"step": 5, "group": "dev"}\n')
        return "12", tmp_path

    def write_meanwhile(path: Path, values: dict[str, str]) -> None:
        if values.get("job"):
            collector.start()
            collector.join(1)
        write(path, values)

    monkeypatch.setattr(validation_jobs, "submit", submit)
    monkeypatch.setattr(validation_jobs, "write_json", write_meanwhile)
    jobs.submit(cfg, 5, tmp_path / "step_5.pt")
    jobs.close()
    collector.join()
    assert [line["step"] for line in collected] == [5]
    assert list(jobs.folder.iterdir()) == []


def test_results_that_are_collected_while_slurm_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job has ended then, and its results are no longer where it put them."""
    jobs = ValidationJobs(tmp_path)
    put(jobs.folder, 5, ".pending", '{"checkpoint": "step_5.pt", "job": "12"}')

    def collect_and_answer(_: str) -> str:
        put(jobs.folder, 5, ".jsonl", '{"step": 5, "group": "dev"}\n')
        assert len(list(jobs.collect())) == 1
        return ""

    monkeypatch.setattr(validation_jobs, "job_state", collect_and_answer)
    jobs.find_lost()
    assert jobs.failures() == {}
    assert list(jobs.folder.iterdir()) == []


def test_an_interrupted_submission_has_failed(tmp_path: Path) -> None:
    put(tmp_path / "validation", 5, ".pending", '{"checkpoint": "step_5.pt", "job": ""}')
    jobs = ValidationJobs(tmp_path)
    assert jobs.pending() == {5}
    jobs.find_lost()
    assert jobs.failures() == {5: "the run ended while the job was submitted"}
    assert ValidationJobs(tmp_path / "new").pending() == set()


def test_training_goes_on_while_sbatch_hangs_and_when_it_refuses(tmp_path: Path, sbatch: Path) -> None:
    gate = tmp_path / "gate"
    sbatch.write_text(
        f"#!/bin/sh\nuntil [ -e {gate} ]; do sleep 0.05; done\necho 'all is full' >&2\nexit 1\n", encoding="utf-8"
    )
    changes: dict[str, Any] = {"run": {"slurm_validation": vars(ONE_TASK)}, "optimizer": {"max_steps": 3}}
    cfg = read_config(write_config(tmp_path, write_recordings(tmp_path / "data", count=4), **changes))

    def open_gate_at_the_end(state: State) -> None:
        assert ValidationJobs(cfg.run.dir).needed() == {0}
        if state.step == 3:
            gate.touch()

    train(cfg, Hooks(after_step=open_gate_at_the_end))
    logged = (cfg.run.dir / "log_0.txt").read_text()
    for step in (0, 3):
        assert f"step {step} is not validated: sbatch refused the job: all is full" in logged
    assert set(ValidationJobs(cfg.run.dir).failures()) == {0, 3}
    assert (cfg.run.dir / "final.pt").exists()


# --------------------------------------------------------------------------------------------------------------------
# On a cluster


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """A run that keeps one checkpoint, and saves at steps 0, 20 and 40."""
    run = {"slurm_validation": vars(ONE_TASK), "keep_latest": 1}
    cfg = read_config(write_config(tmp_path, write_recordings(tmp_path / "data", count=4), run=run))
    cfg.run.dir.mkdir(parents=True)
    (cfg.run.dir / "config.json").write_text((tmp_path / "run.json").read_text())
    for step in (0, 20, 40):
        torch.save({"model": build_model(cfg=cfg.model).state_dict()}, cfg.run.dir / f"step_{step}.pt")
    return cfg


def submit_all(cfg: Config, *steps: int) -> ValidationJobs:
    jobs = ValidationJobs(cfg.run.dir)
    for step in steps:
        jobs.submit(cfg, step, cfg.run.dir / f"step_{step}.pt")
    jobs.close()
    return jobs


def test_validation_jobs(cluster: Cluster, tmp_path: Path, cfg: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """A failed job is named with its log, and repeated; then old checkpoints are removed."""
    (cfg.run.dir / "step_20.pt").rename(tmp_path / "moved.pt")
    jobs = submit_all(cfg, 0, 20, 40)
    assert wait_for(lambda: not jobs.pending(), 200), logs(jobs.folder)
    assert main([str(cfg.run.dir)]) == 1
    said = capsys.readouterr()
    assert said.out == "2 lines collected\n"
    assert said.err.startswith("step 20 is not validated: job ")
    log = Path(said.err.splitlines()[0].rpartition("; see ")[2])
    assert "step_20.pt" in log.read_text("utf-8")
    lines = read_metrics(cfg.run.dir / "metrics.jsonl")
    assert [(line["step"], line["group"]) for line in lines] == [(0, "dev"), (40, "dev")]

    here = tmp_path / "here.jsonl"
    checkpoint = cfg.run.dir / "step_40.pt"
    validate_existing_checkpoint(cfg, ResumeConfig(40, str(checkpoint), str(here)))
    assert lines[1] == json.loads(here.read_text())
    assert sorted(path.name for path in cfg.run.dir.glob("*.pt")) == ["step_40.pt"]

    (tmp_path / "moved.pt").rename(cfg.run.dir / "step_20.pt")
    jobs.submit_again(cfg)
    jobs.close()
    assert wait_for(lambda: not jobs.pending(), 200), logs(jobs.folder)
    assert main([str(cfg.run.dir)]) == 0
    assert capsys.readouterr().out == "1 lines collected\n"
    assert not (cfg.run.dir / "step_20.pt").exists()
    assert main([str(cfg.run.dir)]) == 0
    assert capsys.readouterr().out.startswith("0 lines collected: no validation job has results")


def test_lost_validation_job(
    cluster: Cluster, tmp_path: Path, cfg: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.run("scontrol", "update", "PartitionName=main", "State=DOWN")  # the job has to wait
    try:
        jobs = submit_all(cfg, 20)
        job_id = json.loads((jobs.folder / "step_20.pending").read_text())["job"]
        assert main([str(cfg.run.dir)]) == 0
        assert "not validated yet: steps 20; run this again later" in capsys.readouterr().err
        cluster.run("scancel", job_id)
    finally:
        cluster.run("scontrol", "update", "PartitionName=main", "State=UP")
    with monkeypatch.context() as patch:  # without an answer, nothing changes
        patch.setenv("SLURM_CONF", str(cluster.write_conf_without_controller(tmp_path)))
        jobs.find_lost()
    assert jobs.pending() == {20}
    assert main([str(cfg.run.dir)]) == 1
    assert f"step 20 is not validated: job {job_id} ended without results, see " in capsys.readouterr().err


def test_refused_validation(cluster: Cluster, cfg: Config) -> None:
    assert cfg.run.slurm_validation is not None
    slurm = replace(cfg.run.slurm_validation, partition="nowhere")
    jobs = submit_all(replace(cfg, run=replace(cfg.run, slurm_validation=slurm)), 20)
    assert "sbatch refused the job: " in jobs.failures()[20]
    assert jobs.needed() == {20}

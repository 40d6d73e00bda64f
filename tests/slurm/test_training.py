"""Training in SLURM jobs: preempted, requeued, on several nodes, as an array, with validation in separate jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from signal import Signals
from typing import Any

import pytest

from helpers.processes import complete
from helpers.slurm_cluster import Cluster, logs, wait_for
from helpers.tiny_run import assert_same_outcome, write_config, write_recordings
from spidr.tools.metrics import read_metrics
from spidr.tools.metrics_queue import main as collect
from spidr.validation_jobs import ValidationJobs

HOSTILE = "a 'b\n$(touch pwned)\n\"; touch pwned #{} 5% é"


def start_training(cluster: Cluster, dump: Path, *configs: Path, options: str = "-N 1 -G 2") -> tuple[str, Path]:
    """Launch from the command line. Returns the job id and the job folder."""
    command = [sys.executable, "-m", "spidr", *map(str, configs), "-A", "a", *options.split(), "--dump", str(dump)]
    done = cluster.run(*command)
    assert done.returncode == 0, done.stderr
    job_id, folder = done.stdout.removeprefix("Submitted job ").strip().split(": ", 1)
    return job_id, Path(folder)


def torchrun(processes: int, config: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "spidr.train"]
    done = subprocess.run([sys.executable, *command, str(config)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def steps_done(run_dir: Path) -> int:
    return max((line["step"] for line in read_metrics(run_dir / "metrics.jsonl")), default=0)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_recordings(tmp_path / "data")


@pytest.mark.timeout(600)
def test_preempted_training_ends_as_an_undisturbed_one(
    cluster: Cluster, tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "p/on slurm"
    settings: dict[str, Any] = {
        "data": {"num_workers": 1},  # workers get the signal, too
        "optimizer": {"max_steps": 80},
        "run": {"save_interval": 80},
    }
    job_id, folder = start_training(
        cluster, tmp_path / "dump", write_config(tmp_path, manifest, "on slurm", **settings)
    )
    assert wait_for(lambda: steps_done(run_dir) >= 5, 120), logs(folder)
    cluster.run("scancel", "--signal=USR2", job_id)
    undisturbed = complete(write_config(tmp_path, manifest, "here", **settings), 2)
    job = cluster.wait(job_id, seconds=200)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(folder)
    assert_same_outcome(run_dir, undisturbed)

    # Training did not wait for its validation jobs. Their results are the same, in the same order.
    assert wait_for(lambda: not ValidationJobs(run_dir).pending(), 120), logs(run_dir / "validation")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert collect([str(run_dir), "--entity", "team", "--runid", "abc"]) == 0
    validated, expected = (
        [x for x in read_metrics(d / "metrics.jsonl") if x["group"] == "dev"] for d in (run_dir, undisturbed)
    )
    assert [line["step"] for line in validated] == [0, 80]
    assert validated == expected


@pytest.mark.timeout(600)
def test_array_with_hostile_names_and_overrides(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs, data and jobs whose names and paths are shell code train, and validate in jobs."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / HOSTILE
    manifest = write_recordings(folder / "data", count=6)
    run = {"wandb_project": HOSTILE, "slurm_validation": {"account": HOSTILE, "nodes": 1, "gpus_per_node": 1}}
    configs = [
        write_config(folder, manifest, name, run=run, validation={"dev": {"manifest": str(manifest)}})
        for name in (HOSTILE, "other")
    ]
    done = cluster.run(
        *(sys.executable, "-m", "spidr", *map(str, configs), "-A", HOSTILE, "-N", "1", "-G", "1"),
        *("optimizer.max_steps=2", "optimizer.lr=1e-3", "--dump", str(folder / "d")),
        cwd=tmp_path,
        env=cluster.env | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    job_id = done.stdout.removeprefix("Submitted job ").split(": ")[0]
    (job_folder,) = (folder / "d").iterdir()
    for index, name in enumerate((HOSTILE, "other")):
        assert cluster.wait(f"{job_id}_{index}", seconds=300)["JobState"] == "COMPLETED", logs(job_folder)
        run_dir = folder / HOSTILE / name
        optimizer = json.loads((run_dir / "config.json").read_text())["optimizer"]
        assert (optimizer["max_steps"], optimizer["lr"], steps_done(run_dir)) == (2, 1e-3, 2)
    jobs = ValidationJobs(run_dir)
    assert wait_for(lambda: not jobs.pending(), 200), logs(run_dir / "validation")
    collected = {line["step"] for line in [*jobs.collect(), *read_metrics(run_dir / "metrics.jsonl")]}
    assert {0, 2} <= collected
    assert wait_for(lambda: cluster.run("squeue", "-h").stdout == "", 60)
    assert not list(tmp_path.rglob("pwned"))


# Long versions: four processes, several requeues, every reason to stop.


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_train_as_torchrun(cluster: Cluster, tmp_path: Path, manifest: Path) -> None:
    job_id, folder = start_training(
        cluster, tmp_path / "dump", write_config(tmp_path, manifest, "slurm"), options="-N 2 -G 2 -c 2"
    )
    assert cluster.wait(job_id, seconds=300)["JobState"] == "COMPLETED", logs(folder)
    torchrun(4, write_config(tmp_path, manifest, "here"))
    assert_same_outcome(tmp_path / "p/slurm", tmp_path / "p/here")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_requeues(cluster: Cluster, tmp_path: Path, manifest: Path) -> None:
    """With any signal, without the controller for a while, and with a limit that submitit takes for reached."""
    long = {"max_steps": 200}
    job_id, folder = start_training(
        cluster, tmp_path / "dump", write_config(tmp_path, manifest, "slurm", optimizer=long), options="-N 1 -G 1 -t 10"
    )
    run_dir = tmp_path / "p/slurm"
    for restart, signal in enumerate(["USR2", "TERM", "USR1", "USR2", "USR2"]):
        before = steps_done(run_dir)
        assert wait_for(lambda: steps_done(run_dir) > before + 2, 120), logs(folder)  # noqa: B023
        if restart == 2:
            cluster.stop_controller()
            cluster.signal_tasks(job_id, Signals[f"SIG{signal}"])
            time.sleep(3)
            cluster.start_controller()
        else:
            cluster.run("scancel", f"--signal={signal}", job_id)
        assert wait_for(lambda: cluster.job(job_id).get("Restarts") == str(restart + 1), 120), logs(folder)  # noqa: B023
    assert cluster.wait(job_id, seconds=300)["JobState"] == "COMPLETED", logs(folder)
    torchrun(1, write_config(tmp_path, manifest, "here", optimizer=long))
    assert_same_outcome(run_dir, tmp_path / "p/here")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_preemption_by_a_higher_partition(cluster: Cluster, tmp_path: Path, manifest: Path) -> None:
    long = {"max_steps": 200}
    run_dir = tmp_path / "p/slurm"
    job_id, folder = start_training(
        cluster, tmp_path / "dump", write_config(tmp_path, manifest, "slurm", optimizer=long), options="-N 2 -G 1"
    )
    assert wait_for(lambda: steps_done(run_dir) >= 5, 120), logs(folder)
    urgent = cluster.run(
        "sbatch",
        "--parsable",
        "--partition=high",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        input="#!/bin/sh\nsleep 2\n",
    ).stdout.strip()
    assert cluster.wait(urgent, seconds=100)["JobState"] == "COMPLETED"
    job = cluster.wait(job_id, seconds=300)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(folder)
    assert (run_dir / "log_0.txt").read_text().count("resuming from") == 1
    torchrun(2, write_config(tmp_path, manifest, "here", optimizer=long))
    assert_same_outcome(run_dir, tmp_path / "p/here")


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_time_limit(cluster: Cluster, tmp_path: Path, manifest: Path) -> None:
    """SLURM checks limits every 30 seconds and may signal a minute early, so this takes a while."""
    settings: dict[str, Any] = {"optimizer": {"max_steps": 3000}, "validation": {}, "run": {"save_interval": 100_000}}
    run_dir = tmp_path / "p/slurm"
    config = write_config(tmp_path, manifest, "slurm", **settings)
    job_id, folder = start_training(cluster, tmp_path / "dump", config, options="-N 1 -G 1 -t 2")
    assert wait_for(lambda: cluster.job(job_id).get("Restarts") == "1", 200), logs(folder)
    assert max(int(path.stem.split("_")[1]) for path in run_dir.glob("step_*.pt")) == steps_done(run_dir)
    job = cluster.wait(job_id, seconds=1500)
    assert job["JobState"] == "COMPLETED", logs(folder)
    # On a busy machine, the signal may come before training has resumed.
    assert 1 <= (run_dir / "log_0.txt").read_text().count("resuming from") <= int(job["Restarts"])
    torchrun(1, write_config(tmp_path, manifest, "here", **settings))
    assert_same_outcome(run_dir, tmp_path / "p/here")

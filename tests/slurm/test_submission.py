"""The sbatch command line and the script of a submission."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from spidr.config import SlurmConfig
from spidr.slurm.submission import clean_environment, job_folders, prepare

ONE_TASK = SlurmConfig(account="a", nodes=1, gpus_per_node=1, time=60)
TWO_TASKS = replace(ONE_TASK, gpus_per_node=2)


def run_script(script: str, folder: Path) -> list[str]:
    """The arguments that bash makes of a script's srun line."""
    stubs = "srun() { printf '%s\\0' \"$@\"; }\nmkdir() { :; }\n"
    environment = {"SLURM_JOB_ID": "7", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash"], input=(stubs + script).encode(), env=environment, cwd=folder, capture_output=True, check=True
    )
    assert done.stderr == b""
    return [word.decode() for word in done.stdout.split(b"\0")[:-1]]


names = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(folder=names, options=st.tuples(names, names, names, names, names))
def test_nothing_reaches_a_shell_unquoted(folder: str, options: tuple[str, ...]) -> None:
    account, partition, constraint, qos, memory = options
    config = SlurmConfig(
        account=account,
        nodes=2,
        gpus_per_node=4,
        qos=qos,
        time=60,
        cpus_per_task=3,
        mem_per_gpu=memory,
        constraint=constraint,
        partition=partition,
    )
    path = Path("/dump") / folder
    pattern = str(path).replace("%", "%%")
    submission = prepare(folder, 1, path, config, copy_code=True)
    assert {f"--account={account}", f"--partition={partition}", f"--constraint={constraint}"} < {*submission.command}
    assert {f"--qos={qos}", f"--mem-per-gpu={memory}", f"--output={pattern}/%j_slurm.log"} < {*submission.command}
    arguments = run_script(submission.script, Path("/"))
    assert f"--output={pattern}/%j/%j_%t_log.out" in arguments
    assert arguments[-5:] == [sys.executable, "-P", "-u", f"{path}/code/spidr/slurm/job.py", str(path)]


@given(name=st.text(max_size=300))
def test_slurm_gets_plain_job_names(name: str) -> None:
    submission = prepare(name, 1, Path("/dump/x"), ONE_TASK)
    [given_name] = [word.removeprefix("--job-name=") for word in submission.command if word.startswith("--job-name=")]
    assert shlex.quote(given_name) in (given_name, f"'{given_name}'")
    assert not set(given_name) & set(" \n\t'\"$;&|<>()`\\*?{}[]!#~%/")


def test_cpus_and_arrays() -> None:
    submission = prepare("x", 3, Path("/d/x"), replace(TWO_TASKS, cpus_per_task=5))
    assert "--array=0-2" in submission.command
    assert "--cpus-per-task=5" in submission.command
    # srun does not inherit it from sbatch.
    assert "--cpus-per-task=5" in run_script(submission.script, Path("/"))
    assert "--array" not in " ".join(prepare("x", 1, Path("/d/x"), TWO_TASKS).command)


def test_no_account_is_requested_if_there_are_none() -> None:
    command = prepare("x", 1, Path("/d/x"), SlurmConfig(nodes=1, gpus_per_node=1)).command
    assert not [word for word in command if word.startswith("--account")]


@pytest.mark.parametrize(("minutes", "seconds"), [(None, 120), (1, 15), (4, 60), (60, 120)])
def test_signal_comes_before_the_time_limit(minutes: int | None, seconds: int) -> None:
    submission = prepare("x", 1, Path("/d/x"), replace(ONE_TASK, time=minutes))
    assert f"--signal=USR2@{seconds}" in submission.command


@pytest.mark.parametrize(
    ("status", "states", "restarts", "asked"),
    [
        (0, "RUNNING", 0, 0),
        (1, "RUNNING", 0, 0),
        (75, "RUNNING", 0, 1),
        (75, "COMPLETING", 0, 0),  # cancelled, or out of time
        (75, "- RUNNING", 0, 1),  # the controller does not answer at first
        (75, "RUNNING", 2, 0),
        (0, "RUNNING", 1, 1),  # stopped in good order
        (140, "RUNNING", 0, 1),  # by SIGUSR2, as a task that had only just started
        (143, "RUNNING", 1, 0),  # by SIGTERM, which srun has sent, since another task had failed
        (137, "RUNNING", 0, 0),
    ],
)
def test_script_requeues_a_stopped_job(tmp_path: Path, status: int, states: str, restarts: int, asked: int) -> None:
    stubs = f"""
mkdir() {{ :; }}
sleep() {{ :; }}
srun() {{ return {status}; }}
squeue() {{ read -r state < states; sed -i 1d states; [ "$state" != - ] && echo "$state"; }}
scontrol() {{ echo "$*" >> asked; }}
"""
    (tmp_path / "states").write_text(states.replace(" ", "\n") + "\n")
    (tmp_path / "job/7").mkdir(parents=True)
    (tmp_path / "job/7/.1_stopped").touch()
    (tmp_path / "job/7/.1_failed").touch()
    script = prepare("x", 1, tmp_path / "job", ONE_TASK, max_restarts=2).script
    environment = {"SLURM_JOB_ID": "7", "PATH": os.environ["PATH"], "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(["bash"], input=stubs + script, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == (75 if asked else status)
    said = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert said == "requeue 7\n" * asked


def test_environment_of_an_enclosing_job_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = ("SLURM_JOB_ID", "SLURM_MEM_PER_CPU", "SUBMITIT_EXECUTOR", "RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID")
    outside = ("SLURM_CONF", "SBATCH_PARTITION", "SPIDR_CLUSTER", "PATH")
    for name in (*inside, *outside[:-1]):
        monkeypatch.setenv(name, "1")
    cleaned = clean_environment()
    assert set(outside) <= cleaned.keys()
    assert not set(inside) & cleaned.keys()


@given(name=st.text(max_size=40))
def test_job_folder_is_in_the_dump_folder(name: str) -> None:
    folders = job_folders("/dump", name)
    first, second = next(folders), next(folders)
    assert first.parent == second.parent == Path("/dump")
    assert re.fullmatch(r"_\d{8}-\d{6}", second.name.removeprefix(first.name))
    assert ".." not in first.parts

"""Submitting to SLURM: first what needs none, then jobs on a real one that the tests start themselves."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from signal import Signals
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slurm_cluster import Cluster, missing_programs, wait_for
from spidr import slurm
from spidr.__main__ import main
from spidr.config import ResumeConfig, SlurmConfig, read_config
from spidr.models import build_model
from spidr.slurm import ValidationJobs, launch_with_submitit, submit
from spidr.tools.errors import InputError
from spidr.tools.metrics import read_metrics
from spidr.tools.metrics_queue import main as push_queue
from spidr.train import Hooks, State, train
from spidr.validate import run_validation
from tiny_run import assert_same_outcome, write_config, write_recordings

ONE_TASK = SlurmConfig(account="a", nodes=1, gpus_per_node=1, time=60)
TWO_TASKS = replace(ONE_TASK, gpus_per_node=2)
HOSTILE = "a 'b\n$(touch pwned)\n\"; touch pwned #{} 5% é"

# --------------------------------------------------------------------------------------------------------------------
# The script and its arguments


def run_script(script: str, folder: Path) -> list[str]:
    """What bash makes of a script's srun line."""
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
    config = SlurmConfig(account, 2, 4, qos, 60, 3, memory, constraint, partition)
    path = Path("/dump") / folder
    pattern = str(path).replace("%", "%%")
    submission = slurm.prepare(folder, 1, path, config, copy_code=True)
    assert {f"--account={account}", f"--partition={partition}", f"--constraint={constraint}"} < {*submission.command}
    assert {f"--qos={qos}", f"--mem-per-gpu={memory}", f"--output={pattern}/%j_slurm.log"} < {*submission.command}
    arguments = run_script(submission.script, Path("/"))
    assert f"--output={pattern}/%j/%j_%t_log.out" in arguments
    assert arguments[-7:] == [sys.executable, "-P", "-u", "-c", slurm.RUN, f"{path}/code", f"{path}/%j"]


@given(name=st.text(max_size=300))
def test_job_names_that_slurm_gets_are_plain(name: str) -> None:
    submission = slurm.prepare(name, 1, Path("/dump/x"), ONE_TASK, copy_code=False)
    [given_name] = [word.removeprefix("--job-name=") for word in submission.command if word.startswith("--job-name=")]
    assert shlex.quote(given_name) in (given_name, f"'{given_name}'")
    assert not set(given_name) & set(" \n\t'\"$;&|<>()`\\*?{}[]!#~%/")


def test_cpus_and_arrays() -> None:
    submission = slurm.prepare("x", 3, Path("/d/x"), replace(TWO_TASKS, cpus_per_task=5), copy_code=False)
    assert "--array=0-2" in submission.command
    assert "--cpus-per-task=5" in submission.command
    # srun does not take it from sbatch.
    assert "--cpus-per-task=5" in run_script(submission.script, Path("/"))
    assert "--array" not in " ".join(slurm.prepare("x", 1, Path("/d/x"), TWO_TASKS, copy_code=False).command)


@pytest.mark.parametrize(("minutes", "seconds"), [(None, 120), (1, 15), (4, 60), (60, 120)])
def test_signal_comes_before_the_time_limit(minutes: int | None, seconds: int) -> None:
    submission = slurm.prepare("x", 1, Path("/d/x"), replace(ONE_TASK, time=minutes), copy_code=False)
    assert f"--signal=USR2@{seconds}" in submission.command


def test_environment_of_an_enclosing_job_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "SLURM_JOB_ID",
        "SLURM_MEM_PER_CPU",
        "SUBMITIT_EXECUTOR",
        "RANK",
        "MASTER_ADDR",
        "TORCHELASTIC_RUN_ID",
    ):
        monkeypatch.setenv(name, "1")
    for name in ("SLURM_CONF", "SBATCH_PARTITION", "SPIDR_CLUSTER"):
        monkeypatch.setenv(name, "kept")
    before = dict(os.environ)
    cleaned = slurm.clean_environment()
    assert os.environ == before
    assert {"SLURM_CONF", "SBATCH_PARTITION", "SPIDR_CLUSTER", "PATH"} <= cleaned.keys()
    assert not {"SLURM_JOB_ID", "SLURM_MEM_PER_CPU", "SUBMITIT_EXECUTOR", "RANK", "MASTER_ADDR"} & cleaned.keys()
    assert "TORCHELASTIC_RUN_ID" not in cleaned


# --------------------------------------------------------------------------------------------------------------------
# The job folder


@given(name=st.text(max_size=40))
def test_job_folder_is_in_the_dump_folder(name: str) -> None:
    launch = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    folders = slurm.job_folders("/dump", name, launch)
    first, second = next(folders), next(folders)
    assert first.parent == second.parent == Path("/dump")
    assert second.name == f"{first.name}_20260102-030405"
    assert ".." not in first.parts


@pytest.fixture
def fake_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An sbatch that accepts everything, for tests of what lies around it."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\ncat > /dev/null\necho 12\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return


@pytest.mark.usefixtures("fake_sbatch")
def test_job_folder_holds_what_is_needed_to_do_it_again(tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    job_id, folder = submit("name", [(print, ("x",))], tmp_path / "dump", TWO_TASKS, copy_code=True)
    assert (job_id, folder) == ("12", tmp_path / "dump" / "name")
    info = json.loads((folder / "job-info.json").read_text())
    launched = datetime.fromisoformat(info.pop("launch_time"))
    assert before <= launched <= datetime.now(UTC)
    assert launched.utcoffset() is not None
    settings = {"account": "a", "nodes": 1, "gpus_per_node": 2, "qos": None, "time": 60, "cpus_per_task": None}
    assert info == {"job_name": "name", **settings, "mem_per_gpu": None, "constraint": None, "partition": None}
    assert {path.name for path in (folder / "12").iterdir()} == {"12_submitted.pkl", "12_submission.sh"}
    assert (folder / "code/spidr/slurm.py").read_text() == Path(slurm.__file__).read_text()
    assert not list(folder.rglob("__pycache__"))

    _, second = submit("name", [(print, ("x",))] * 2, tmp_path / "dump", TWO_TASKS, copy_code=False)
    _, third = submit("name", [(print, ("x",))], tmp_path / "dump", TWO_TASKS, copy_code=False)
    assert len({folder, second, third}) == 3
    assert second.name.startswith("name_20")
    assert not (second / "code").exists()
    assert {path.name for path in second.glob("12_*")} == {"12_0", "12_1"}


@pytest.mark.usefixtures("fake_sbatch")
@pytest.mark.parametrize("dump", ["file", "file/below", "/proc/dump", "/sys"])
def test_dump_folder_that_cannot_be_written(tmp_path: Path, dump: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file|/proc/dump|/sys"):
        submit("name", [(print, ())], tmp_path / dump, ONE_TASK, copy_code=False)
    assert launch_with_submitit("name", [(print, ())], tmp_path / dump, ONE_TASK, copy_code=False) is False
    assert caplog.records[-1].levelno == logging.ERROR


def test_no_slurm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch_with_submitit("name", [(print, ())], tmp_path / "dump", ONE_TASK, copy_code=True) is False
    assert "sbatch cannot be run: No such file or directory" in caplog.text
    assert not list((tmp_path / "dump").iterdir())


def git(folder: Path, *args: str) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run(["git", "-C", str(folder), *identity, *args], check=True, capture_output=True)


def test_checkout_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the current folder, nor one that an environment with the installed package happens to lie in."""
    tracked, installed = tmp_path / "repo/src/spidr", tmp_path / "repo/.venv/site-packages/spidr"
    for folder in (tracked, installed, tmp_path / "elsewhere/spidr"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("1\n")
    git(tmp_path, "init", "--initial-branch=topic", "repo")
    git(tmp_path / "repo", "add", "src")
    git(tmp_path / "repo", "commit", "-m", "x")
    monkeypatch.chdir(tmp_path / "elsewhere")
    commit = (tmp_path / "repo/.git/refs/heads/topic").read_text().strip()
    found = slurm.describe_checkout(tracked)
    assert found == {"git-info.txt": f"branch: topic\ncommit: {commit}\n".encode(), "git-diff.patch": b""}
    (tracked / "__init__.py").write_text("2\n")
    assert b"-1\n+2\n" in slurm.describe_checkout(tracked)["git-diff.patch"]
    monkeypatch.chdir(tmp_path / "repo")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "repo/.git"))
    assert slurm.describe_checkout(installed) == {}
    assert slurm.describe_checkout(tmp_path / "elsewhere/spidr") == {}


@pytest.mark.usefixtures("fake_sbatch")
@pytest.mark.parametrize("place", ["env/lib/python3.12/site-packages", "repo/src"])
def test_working_tree_is_copied_and_installed_package_is_not(tmp_path: Path, place: str) -> None:
    """From the code that runs, not from where the user stands: in a checkout with an installed package, or outside."""
    package, repo, elsewhere = tmp_path / place / "spidr", tmp_path / "repo", tmp_path / "elsewhere"
    elsewhere.mkdir()
    git(tmp_path, "init", "repo")
    shutil.copytree(slurm.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (repo / "README").touch()
    git(repo, "add", ".")
    git(repo, "commit", "-m", "x")
    installed = package.parent.name == "site-packages"
    config = write_config(tmp_path, write_recordings(tmp_path / "data", count=2))
    done = subprocess.run(
        [sys.executable, "-m", "spidr", str(config), "-A", "a", "-N", "1", "-G", "1", "--dump", str(tmp_path / "dump")],
        cwd=repo if installed else elsewhere,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    folder = tmp_path / "dump/run"
    assert (done.returncode, done.stdout) == (0, f"Submitted job 12: {folder}\n"), done.stderr
    assert (folder / "code").exists() == (folder / "git-info.txt").exists() == (not installed)
    code = package.parent if installed else folder / "code"
    assert f" {code} {folder}/%j\n" in (folder / "12/12_submission.sh").read_text()


# --------------------------------------------------------------------------------------------------------------------
# Validation jobs, as files


def test_settings_of_validation_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_STEP_ID", "SLURM_JOB_ACCOUNT", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    cfg = read_config(write_config(tmp_path, tmp_path / "m.csv"))
    own = read_config(write_config(tmp_path, tmp_path / "m.csv", run={"slurm_validation": vars(TWO_TASKS)}))
    assert not slurm.validates_in_jobs(cfg)
    assert slurm.validates_in_jobs(own)
    assert slurm.validation_slurm(own) == TWO_TASKS
    assert slurm.validation_slurm(cfg) == SlurmConfig("", 1, 1, time=60)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_JOB_ACCOUNT", "abc@h100")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "24")
    assert slurm.validates_in_jobs(cfg)
    assert slurm.validation_slurm(cfg) == SlurmConfig("abc@h100", 1, 1, time=60, cpus_per_task=24)


def test_results_are_collected_in_the_order_of_steps(tmp_path: Path) -> None:
    folder = tmp_path / "validation"
    folder.mkdir()

    def put(step: int) -> None:
        (folder / f"step_{step}.jsonl").write_text("".join(f'{{"step": {step}, "group": "{g}"}}\n' for g in "ab"))

    for step in (100, 200, 1000):
        (folder / f"step_{step}.pending").write_text("1")
    jobs = ValidationJobs(tmp_path)
    put(0)
    put(200)
    assert jobs.pending() == {100, 1000}
    assert list(jobs.collect()) == [{"step": 0, "group": "a"}, {"step": 0, "group": "b"}]
    assert list(jobs.collect()) == []
    put(100)
    lines = jobs.collect()
    assert [next(lines) for _ in range(3)][-1] == {"step": 200, "group": "a"}
    lines.close()  # a process that dies here
    assert [line["step"] for line in ValidationJobs(tmp_path).collect()] == [200, 200]
    assert [path.name for path in folder.iterdir()] == ["step_1000.pending"]


def test_training_goes_on_while_sbatch_hangs_and_when_it_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate, program = tmp_path / "gate", tmp_path / "bin/sbatch"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nuntil [ -e {gate} ]; do sleep 0.05; done\necho 'all is full' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    changes: dict[str, Any] = {"run": {"slurm_validation": vars(ONE_TASK)}, "optimizer": {"max_steps": 3}}
    cfg = read_config(write_config(tmp_path, write_recordings(tmp_path / "data", count=4), **changes))

    def submitting() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith(slurm.SUBMITTING)]

    def open_gate_at_the_end(state: State) -> None:
        assert len(submitting()) == 1
        if state.step == 3:
            gate.touch()

    train(cfg, Hooks(after_step=open_gate_at_the_end))
    for thread in submitting():
        thread.join()
    logged = (cfg.run.dir / "log_0.txt").read_text() + caplog.text  # during the run and after it
    for step in (0, 3):
        assert f"step {step} is not validated: sbatch refused the job: all is full" in logged
    assert ValidationJobs(cfg.run.dir).pending() == set()
    assert (cfg.run.dir / "final.pt").exists()


SUBMIT_AND_FORK = """
import os, sys, threading, time
from pathlib import Path
from spidr.config import SlurmConfig
from spidr.slurm import submit

def submit_many():
    for index in range(10):
        submit(str(index), [(print, ("x",))], sys.argv[1], SlurmConfig("a", 1, 1), copy_code=False)

thread = threading.Thread(target=submit_many)
thread.start()
children = []
while thread.is_alive() and len(children) < 2000 and not Path(sys.argv[2]).exists():
    children.append(os.fork())
    if not children[-1]:
        time.sleep(100)
        os._exit(0)
    time.sleep(0.002)
thread.join(20)
print("held up" if thread.is_alive() else "submitted", flush=True)
for child in children:
    os.kill(child, 9)
"""


@pytest.mark.usefixtures("fake_sbatch")
def test_workers_forked_meanwhile_do_not_hold_up_a_submission(tmp_path: Path) -> None:
    """They inherit whatever files are open, and live for hours."""
    command = [sys.executable, "-W", "ignore", "-c", SUBMIT_AND_FORK, str(tmp_path / "dump"), str(tmp_path / "stop")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "submitted\n"
    assert len(list((tmp_path / "dump").iterdir())) == 10


SUBMIT_ONCE = """
import signal, sys
from spidr.config import SlurmConfig
from spidr.slurm import submit

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda *_: None)
print(submit("x", [(print, ("x",))], sys.argv[1], SlurmConfig("a", 1, 1), copy_code=False)[0])
"""


@pytest.mark.usefixtures("fake_sbatch")
def test_signals_to_a_job_do_not_end_its_submissions(tmp_path: Path) -> None:
    """A preemption's signal may come to all processes of the group, or to all below the job."""
    started, gate, program = tmp_path / "started", tmp_path / "gate", tmp_path / "bin/sbatch"
    # Not sh, which unblocks what the program that it stands for leaves blocked.
    program.write_text(f"#!/bin/bash\necho $$ > {started}\nuntil [ -e {gate} ]; do sleep 0.05; done\necho 34\n")
    command = [sys.executable, "-c", SUBMIT_ONCE, str(tmp_path / "dump")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert wait_for(lambda: started.exists() and started.read_text().endswith("\n"), 60)
        for number in (Signals.SIGTERM, Signals.SIGUSR1, Signals.SIGUSR2, Signals.SIGINT):
            os.killpg(process.pid, number)
            os.kill(int(started.read_text()), number)
        time.sleep(0.5)
        gate.touch()
        assert process.communicate() == ("34\n", None)
    assert process.returncode == 0


@pytest.mark.usefixtures("fake_sbatch")
def test_whoever_interrupts_a_submission_ends_it(tmp_path: Path) -> None:
    started, program = tmp_path / "started", tmp_path / "bin/sbatch"
    program.write_text(f"#!/bin/sh\necho $$ > {started}\nexec sleep 100\n")
    config = write_config(tmp_path, write_recordings(tmp_path / "data", count=2))
    options = ["-A", "a", "-N", "1", "-G", "1", "--dump", str(tmp_path / "dump")]
    command = [sys.executable, "-m", "spidr", str(config), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert wait_for(lambda: started.exists() and started.read_text().endswith("\n"), 60)
        process.send_signal(Signals.SIGINT)
        assert "interrupted" in process.communicate()[1]
    assert process.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert not list((tmp_path / "dump").iterdir())


def test_a_submission_that_was_cut_off_is_no_job(tmp_path: Path) -> None:
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation/step_5.pending").touch()
    assert ValidationJobs(tmp_path).pending() == set()
    assert ValidationJobs(tmp_path / "new").pending() == set()


# --------------------------------------------------------------------------------------------------------------------
# On a cluster


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"SLURM is not installed: no {', '.join(missing)} (Debian: slurm-wlm and munge)")
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def cluster(started: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, as seen from the environment of this process."""
    for name in os.environ:
        if name.startswith(("SLURM", "SBATCH", "SPIDR")):
            monkeypatch.delenv(name)
    for name, value in started.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return started


def logs(folder: Path) -> str:
    """All that the tasks and SLURM wrote."""
    return "\n".join(path.read_text() for path in sorted(folder.rglob("*.err")) + sorted(folder.glob("*.log")))


def test_array_with_hostile_names_from_inside_a_job(cluster: Cluster, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    dump = tmp_path / HOSTILE / "dump"

    def report(number: int) -> None:
        import spidr

        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_ARRAY_TASK_ID", "CUDA_VISIBLE_DEVICES")
        seen = [number, os.getcwd(), spidr.__file__, *(os.environ[name] for name in names)]  # noqa: PTH109
        Path(f"{number}.{os.environ['SLURM_PROCID']}").write_text(json.dumps(seen))

    def launch() -> None:
        before = dict(os.environ), os.getcwd(), logging.getLogger().handlers[:]  # noqa: PTH109
        job_id, folder = submit(HOSTILE, [(report, (0,)), (report, (1,))], dump, TWO_TASKS, copy_code=True)
        assert before == (dict(os.environ), os.getcwd(), logging.getLogger().handlers)  # noqa: PTH109
        Path("inner").write_text(json.dumps([job_id, str(folder)]))

    outer, outer_folder = submit("outer", [(launch, ())], tmp_path / "outer", ONE_TASK, copy_code=False)
    assert cluster.wait(outer)["JobState"] == "COMPLETED", logs(outer_folder)
    job_id, folder = json.loads((tmp_path / "inner").read_text())
    for number in (0, 1):
        assert cluster.wait(f"{job_id}_{number}")["JobState"] == "COMPLETED", logs(Path(folder))
        for rank in (0, 1):
            seen = json.loads((tmp_path / f"{number}.{rank}").read_text())
            code = str(Path(folder) / "code/spidr/__init__.py")
            assert seen == [number, str(tmp_path), code, str(rank), "2", str(number), "0,1"]
        assert (Path(folder) / f"{job_id}_{number}/{job_id}_{number}_1_log.out").exists()
    assert folder == str(dump / HOSTILE.replace("%", "_"))
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.timeout(600)
def test_hostile_configuration(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and paths that are shell code, of the run, its data and the job: it trains, and validates in a job."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / HOSTILE
    manifest = write_recordings(folder / "data", count=6)
    config = write_config(
        folder,
        manifest,
        HOSTILE,
        run={"wandb_project": HOSTILE, "slurm_validation": {"account": HOSTILE, "nodes": 1, "gpus_per_node": 1}},
        optimizer={"max_steps": 2, "warmup_steps": 1},
    )
    done = cluster.run(
        *(sys.executable, "-m", "spidr", str(config), "-A", HOSTILE, "-N", "1", "-G", "2", "--dump", str(folder / "d")),
        cwd=tmp_path,
        env=cluster.env | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    job_id = done.stdout.removeprefix("Submitted job ").split(": ")[0]
    (job_folder,) = (folder / "d").iterdir()
    assert cluster.wait(job_id, seconds=300)["JobState"] == "COMPLETED", logs(job_folder)
    run_dir = folder / HOSTILE / HOSTILE
    assert (run_dir / "final.pt").is_file()
    jobs = ValidationJobs(run_dir)
    assert wait_for(lambda: not jobs.pending(), 200), logs(run_dir / "validation")
    collected = {line["step"] for line in [*jobs.collect(), *read_metrics(run_dir / "metrics.jsonl")]}
    assert {0, 2} <= collected
    assert wait_for(lambda: cluster.run("squeue", "-h").stdout == "", 60)
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("option", ["-C", "-p", "--mem-per-gpu", "-q", "-t", "-c", "-N", "-G"])
def test_hostile_options(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """What SLURM does not refuse, such as a quality of service where nothing counts jobs, it takes as a name."""
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, write_recordings(tmp_path / "data", count=2), optimizer={"max_steps": 1})
    dump = tmp_path / "dump"
    try:
        status = main([str(config), "-A", "a", "-N", "1", "-G", "1", option, HOSTILE, "--dump", str(dump)])
    except SystemExit as end:  # not even a number
        status = end.code
    captured = capsys.readouterr()
    if status == 0:
        assert option == "-q"
        job_id = captured.out.removeprefix("Submitted job ").split(": ")[0]
        cluster.run("scancel", job_id)
        cluster.wait(job_id)
    else:
        assert status == 2
        assert len([line for line in captured.err.splitlines() if "error: " in line]) == 1, captured.err
        assert not dump.exists() or not list(dump.iterdir())
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["-G", "1", "-p", "nowhere"], "invalid partition specified: nowhere"),
        (["-G", "9"], "Requested node configuration is not available"),
        (["-G", "1", "-C", "tpu"], "Invalid feature specification"),
    ],
)
def test_refused(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    config = write_config(tmp_path, write_recordings(tmp_path / "data", count=2))
    dump = tmp_path / "dump"
    assert main([str(config), "-A", "a", "-N", "1", *options, "--dump", str(dump)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: sbatch refused the job: ")
    assert captured.err.count("\n") == 1
    assert reason in captured.err
    assert not list(dump.iterdir())
    assert cluster.run("squeue", "-h").stdout == ""


def test_no_controller(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster.write_conf_without_controller(tmp_path)))
    assert launch_with_submitit("x", [(print, ())], tmp_path / "dump", ONE_TASK, copy_code=False) is False
    assert "sbatch refused the job: sbatch: error: Batch job submission failed: Unable to contact slurm" in caplog.text


def test_wrong_input_ends_the_job_with_one_line(cluster: Cluster, tmp_path: Path) -> None:
    def fail() -> None:
        from spidr.tools.errors import InputError

        raise InputError("x.csv: no such manifest")

    job_id, folder = submit("fails", [(fail, ())], tmp_path, ONE_TASK, copy_code=False)
    job = cluster.wait(job_id)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert (folder / job_id / f"{job_id}_0_log.err").read_text() == "error: x.csv: no such manifest\n"


def test_signal_before_the_job_has_begun(cluster: Cluster, tmp_path: Path) -> None:
    """While modules are imported, which takes long on a busy machine."""
    loading, loaded, ran = tmp_path / "loading", tmp_path / "loaded", tmp_path / "ran"

    def load() -> str:
        if not loading.exists():
            loading.touch()
            while not loaded.exists():
                time.sleep(0.1)
        return "x"

    class LoadedSlowly:
        def __reduce__(self) -> Any:
            return load, ()

    job_id, folder = submit("early", [(ran.write_text, (LoadedSlowly(),))], tmp_path, ONE_TASK, copy_code=False)
    assert wait_for(loading.exists, 60)
    cluster.run("scancel", "--signal=USR2", job_id)
    time.sleep(1)
    loaded.touch()
    job = cluster.wait(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(folder)
    assert ran.read_text() == "x"


def test_a_job_that_is_told_to_stop_still_submits(cluster: Cluster, tmp_path: Path) -> None:
    """Its validation, that is, with an sbatch that takes its time."""
    submitting, submitted = tmp_path / "submitting", tmp_path / "submitted"
    program = tmp_path / "bin/sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\ntouch {submitting}\nsleep 4\nexec {shutil.which("sbatch")} "$@"\n')
    program.chmod(0o755)

    def train() -> None:
        import signal

        from spidr.environment import Preempted

        if submitted.exists():
            return
        signal.signal(signal.SIGUSR2, signal.default_int_handler)
        os.environ["PATH"] = f"{program.parent}:{os.environ['PATH']}"

        def validate() -> None:
            job_id, _ = submit("inner", [((tmp_path / "validated").touch, ())], tmp_path, ONE_TASK, copy_code=False)
            submitted.write_text(job_id)

        try:
            threading.Thread(target=validate, name=slurm.SUBMITTING).start()
            time.sleep(100)
        except KeyboardInterrupt:
            raise Preempted(signal.SIGUSR2) from None

    job_id, folder = submit("outer", [(train, ())], tmp_path, ONE_TASK, copy_code=False)
    assert wait_for(submitting.exists, 60), logs(folder)
    cluster.run("scancel", "--signal=USR2", job_id)
    job = cluster.wait(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(folder)
    assert cluster.wait(submitted.read_text())["JobState"] == "COMPLETED", logs(folder)
    assert (tmp_path / "validated").exists()


def test_cancelled_job_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    """SLURM tells a job that its user cancels it by the same signal as one that it preempts."""
    running = tmp_path / "running"

    def train() -> None:
        import signal

        from spidr.environment import Preempted

        signal.signal(signal.SIGTERM, signal.default_int_handler)
        running.touch()
        try:
            time.sleep(100)
        except KeyboardInterrupt:
            raise Preempted(signal.SIGTERM) from None

    job_id, folder = submit("cancelled", [(train, ())], tmp_path, ONE_TASK, copy_code=False)
    assert wait_for(running.exists, 60)
    cluster.run("scancel", job_id)
    job = cluster.wait(job_id)
    assert job["JobState"] == "CANCELLED"
    assert wait_for(lambda: "is not requeued" in logs(folder), 10), logs(folder)
    assert (cluster.job(job_id)["JobState"], job["Restarts"]) == ("CANCELLED", "0")


def test_validation_jobs(cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = read_config(write_config(tmp_path, write_recordings(tmp_path / "data", count=4)))
    cfg.run.dir.mkdir(parents=True)
    checkpoint = tmp_path / "step_0.pt"
    torch.save({"model": build_model(cfg=cfg.model).state_dict()}, checkpoint)
    jobs = ValidationJobs(cfg.run.dir)
    jobs.submit(cfg, 0, checkpoint).join()
    jobs.submit(cfg, 20, tmp_path / "missing.pt").join()
    jobs.submit(cfg, 40, checkpoint).join()
    refused = replace(cfg, run=replace(cfg.run, slurm_validation=replace(ONE_TASK, partition="nowhere")))
    jobs.submit(refused, 60, checkpoint).join()
    assert "step 60 is not validated: sbatch refused the job: " in caplog.text
    assert jobs.pending() <= {0, 20, 40}
    assert wait_for(lambda: not jobs.pending(), 60), logs(jobs.folder)
    lines = list(jobs.collect())
    assert [(line["step"], line["group"]) for line in lines] == [(0, "dev"), (40, "dev")]

    here = tmp_path / "here.jsonl"
    run_validation(cfg, ResumeConfig(0, str(checkpoint), str(here)))
    assert lines[0] == json.loads(here.read_text())
    assert lines[1] == lines[0] | {"step": 40}


def test_validation_job_that_is_lost(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = read_config(write_config(tmp_path, tmp_path / "m.csv"))
    cfg.run.dir.mkdir(parents=True)
    jobs = ValidationJobs(cfg.run.dir)
    cluster.run("scontrol", "update", "PartitionName=main", "State=DOWN")  # the job shall wait
    try:
        jobs.submit(cfg, 100, tmp_path / "step_100.pt").join()
        job_id = (jobs.folder / "step_100.pending").read_text()
        jobs.forget_lost()
        assert jobs.pending() == {100}
        cluster.run("scancel", job_id)
    finally:
        cluster.run("scontrol", "update", "PartitionName=main", "State=UP")
    with monkeypatch.context() as patch:  # no answer is no news
        patch.setenv("SLURM_CONF", str(cluster.write_conf_without_controller(tmp_path)))
        jobs.forget_lost()
    assert jobs.pending() == {100}
    jobs.forget_lost()
    assert jobs.pending() == set()
    assert f"step 100 is not validated: job {job_id} ended without results" in caplog.text


# --------------------------------------------------------------------------------------------------------------------
# Real training


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
    run_dir, undisturbed = tmp_path / "p/on slurm", tmp_path / "p/here"
    settings: dict[str, Any] = {
        "data": {"num_workers": 1},  # the signal reaches workers, too
        "optimizer": {"max_steps": 80},
        "run": {"save_interval": 40},
    }
    job_id, folder = start_training(
        cluster, tmp_path / "dump", write_config(tmp_path, manifest, "on slurm", **settings)
    )
    assert wait_for(lambda: steps_done(run_dir) >= 5, 120), logs(folder)
    cluster.run("scancel", "--signal=USR2", job_id)
    torchrun(2, write_config(tmp_path, manifest, "here", **settings))
    job = cluster.wait(job_id, seconds=200)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(folder)
    assert_same_outcome(run_dir, undisturbed)

    # Training has not waited for the validation jobs that it submitted. What they find is the same, in the same order.
    assert wait_for(lambda: not ValidationJobs(run_dir).pending(), 120), logs(run_dir / "validation")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert push_queue([str(run_dir), "--entity", "team", "--runid", "abc"]) == 0
    validated, expected = (
        [x for x in read_metrics(d / "metrics.jsonl") if x["group"] == "dev"] for d in (run_dir, undisturbed)
    )
    assert [line["step"] for line in validated] == [0, 40, 80]
    assert validated == expected


# The long versions: four processes, several requeues, every reason to stop.


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
def test_array_of_three_configurations(cluster: Cluster, tmp_path: Path, manifest: Path) -> None:
    configs = [write_config(tmp_path, manifest, name, run={"random_seed": seed}) for seed, name in enumerate("abc")]
    job_id, folder = start_training(cluster, tmp_path / "dump", *configs, options="-N 1 -G 1")
    assert folder == tmp_path / "dump/a"
    for index, name in enumerate("abc"):
        assert cluster.wait(f"{job_id}_{index}", seconds=300)["JobState"] == "COMPLETED", logs(folder)
        assert (folder / f"{job_id}_{index}/{job_id}_{index}_0_log.out").exists()
        assert json.loads((tmp_path / f"p/{name}/config.json").read_text())["run"]["random_seed"] == index
        assert steps_done(tmp_path / f"p/{name}") == 40


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_more_requeues_than_submitit_allows(cluster: Cluster, tmp_path: Path, manifest: Path) -> None:
    """Whatever the signal, without the controller for a while, and with a limit that submitit counts as reached."""
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
    assert (run_dir / "log_0.txt").read_text().count("going on") == 1
    torchrun(2, write_config(tmp_path, manifest, "here", optimizer=long))
    assert_same_outcome(run_dir, tmp_path / "p/here")


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_time_limit(cluster: Cluster, tmp_path: Path, manifest: Path) -> None:
    """SLURM looks at limits once in 30 seconds and may signal a minute early, so that takes a while."""
    settings: dict[str, Any] = {"optimizer": {"max_steps": 3000}, "validation": {}, "run": {"save_interval": 100_000}}
    run_dir = tmp_path / "p/slurm"
    config = write_config(tmp_path, manifest, "slurm", **settings)
    job_id, folder = start_training(cluster, tmp_path / "dump", config, options="-N 1 -G 1 -t 2")
    assert wait_for(lambda: cluster.job(job_id).get("Restarts") == "1", 200), logs(folder)
    assert max(int(path.stem.split("_")[1]) for path in run_dir.glob("step_*.pt")) == steps_done(run_dir)
    job = cluster.wait(job_id, seconds=1500)
    assert job["JobState"] == "COMPLETED", logs(folder)
    # On a busy machine, the signal may come before training has begun again.
    assert 1 <= (run_dir / "log_0.txt").read_text().count("going on") <= int(job["Restarts"])
    torchrun(1, write_config(tmp_path, manifest, "here", **settings))
    assert_same_outcome(run_dir, tmp_path / "p/here")

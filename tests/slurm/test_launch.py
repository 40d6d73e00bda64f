"""Submitted calls: the job folder, what is refused, and jobs on a real SLURM."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from signal import Signals
from typing import Any

import pytest

from helpers.slurm_cluster import Cluster, is_running, logs, wait_for
from helpers.tiny_run import write_config, write_recordings
from spidr.__main__ import main
from spidr.config import SlurmConfig
from spidr.slurm import launch_with_submitit
from spidr.slurm.code import PACKAGE
from spidr.slurm.launch import submit
from spidr.tools.errors import InputError

ONE_TASK = SlurmConfig(account="a", nodes=1, gpus_per_node=1, time=60)
TWO_TASKS = replace(ONE_TASK, gpus_per_node=2)
HOSTILE = "a 'b\n$(touch pwned)\n\"; touch pwned #{} 5% é"


@pytest.mark.usefixtures("sbatch")
def test_job_folder_has_all_that_is_needed_to_repeat_the_job(tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    job_id, folder = submit("name", [(print, ("x",))], tmp_path / "dump", TWO_TASKS, copy_code=True)
    assert (job_id, folder) == ("12", tmp_path / "dump" / "name")
    info = json.loads((folder / "job-info.json").read_text())
    launched = datetime.fromisoformat(info.pop("launch_time"))
    assert before <= launched <= datetime.now(UTC)
    assert launched.utcoffset() is not None
    settings = {"account": "a", "nodes": 1, "gpus_per_node": 2, "qos": None, "time": 60, "cpus_per_task": None}
    assert info == {"job_name": "name", **settings, "mem_per_gpu": None, "constraint": None, "partition": None}
    assert (folder / "code/spidr/config.py").read_text() == (PACKAGE / "config.py").read_text()
    assert not list(folder.rglob("__pycache__"))

    _, second = submit("name", [(print, ("x",))] * 2, tmp_path / "dump", TWO_TASKS)
    _, third = submit("name", [(print, ("x",))], tmp_path / "dump", TWO_TASKS)
    assert len({folder, second, third}) == 3
    assert second.name.startswith("name_20")
    assert not (second / "code").exists()
    assert {path.name for path in second.glob("call_*")} == {"call_0.pkl", "call_1.pkl"}


@pytest.mark.usefixtures("sbatch")
def test_settings_may_be_a_dictionary_as_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    jobs: Any = [(print, ("x",)), (print, ())]
    assert launch_with_submitit("name", jobs, tmp_path, {"nodes": 1, "gpus_per_node": 2, "time": 30}) is True
    info = json.loads((tmp_path / "name/job-info.json").read_text())
    assert (info["nodes"], info["gpus_per_node"], info["time"], info["account"]) == (1, 2, 30, None)
    assert launch_with_submitit("name", jobs, tmp_path, {"nodes": 0, "gpu": 2}) is False
    assert "nodes: found 0" in caplog.text
    assert "gpu: unknown key" in caplog.text


@pytest.mark.usefixtures("sbatch")
@pytest.mark.parametrize("dump", ["file", "file/below", "/proc/dump", "/sys"])
def test_dump_folder_that_cannot_be_written(tmp_path: Path, dump: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file|/proc/dump|/sys"):
        submit("name", [(print, ())], tmp_path / dump, ONE_TASK)
    assert launch_with_submitit("name", [(print, ())], tmp_path / dump, ONE_TASK) is False
    assert caplog.records[-1].levelno == logging.ERROR


def test_no_slurm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch_with_submitit("name", [(print, ())], tmp_path / "dump", ONE_TASK, copy_code=True) is False
    assert "sbatch cannot be run: No such file or directory" in caplog.text
    assert not list((tmp_path / "dump").iterdir())


def test_sbatch_that_hangs(tmp_path: Path, sbatch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed with its children; the job may exist, so its folder is kept."""
    sbatch.write_text(
        f"#!/bin/bash\necho $$ >> {tmp_path}/pids\nbash -c 'echo $$ >> {tmp_path}/pids; sleep 100'\n", encoding="utf-8"
    )
    monkeypatch.setattr("spidr.slurm.submission.LIMIT", 5.0)
    with pytest.raises(InputError, match=r"sbatch has not answered for 5 s .* `squeue --me --name=the_name`"):
        submit("the name", [(print, ())], tmp_path / "dump", ONE_TASK)
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    assert wait_for(lambda: not any(map(is_running, pids)), 60)
    assert (tmp_path / "dump/the name/call_0.pkl").exists()


@pytest.mark.usefixtures("sbatch")
@pytest.mark.parametrize("place", ["env/lib/python3.12/site-packages", "repo/src"])
def test_working_tree_is_copied_and_installed_package_is_not(tmp_path: Path, place: str) -> None:
    """The running code counts, not the current folder, in a checkout with an installed package or outside."""
    package, repo, elsewhere = tmp_path / place / "spidr", tmp_path / "repo", tmp_path / "elsewhere"
    elsewhere.mkdir()
    git(tmp_path, "init", "repo")
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
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
    assert f" {code}/spidr/slurm/job.py {folder}\n" in (folder / "submission.sh").read_text()


def git(folder: Path, *args: str) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run(["git", "-C", str(folder), *identity, *args], check=True, capture_output=True)


def test_interrupting_a_submission_ends_it(tmp_path: Path, sbatch: Path) -> None:
    started = tmp_path / "started"
    sbatch.write_text(f"#!/bin/sh\necho $$ > {started}\nexec sleep 100\n", encoding="utf-8")
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


# --------------------------------------------------------------------------------------------------------------------
# On a cluster


def test_array_with_hostile_names_from_inside_a_job(cluster: Cluster, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    dump = tmp_path / HOSTILE / "dump"

    def report(number: int) -> None:
        import spidr

        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_ARRAY_TASK_ID", "CUDA_VISIBLE_DEVICES")
        seen = [number, os.getcwd(), spidr.__file__, *(os.environ[name] for name in names)]  # noqa: PTH109
        Path(f"{number}.{os.environ['SLURM_PROCID']}").write_text(json.dumps(seen), encoding="utf-8")

    def launch() -> None:
        before = dict(os.environ), os.getcwd(), logging.getLogger().handlers[:]  # noqa: PTH109
        job_id, folder = submit(HOSTILE, [(report, (0,)), (report, (1,))], dump, TWO_TASKS, copy_code=True)
        assert before == (dict(os.environ), os.getcwd(), logging.getLogger().handlers)  # noqa: PTH109
        Path("inner").write_text(json.dumps([job_id, str(folder)]), encoding="utf-8")

    outer, outer_folder = submit("outer", [(launch, ())], tmp_path / "outer", ONE_TASK)
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


@pytest.mark.parametrize("option", ["-C", "-p", "--mem-per-gpu", "-q", "-t", "-c", "-N", "-G"])
def test_hostile_options(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """What SLURM does not refuse, such as a quality of service without accounting, it takes as a name."""
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
    assert launch_with_submitit("x", [(print, ())], tmp_path / "dump", ONE_TASK) is False
    assert "sbatch refused the job: sbatch: error: Batch job submission failed: Unable to contact slurm" in caplog.text


def test_wrong_input_ends_the_job_with_one_line(cluster: Cluster, tmp_path: Path) -> None:
    def fail() -> None:
        from spidr.tools.errors import InputError

        raise InputError("x.csv: no such manifest")

    job_id, folder = submit("fails", [(fail, ())], tmp_path, ONE_TASK)
    job = cluster.wait(job_id)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert (folder / job_id / f"{job_id}_0_log.err").read_text() == "error: x.csv: no such manifest\n"


def test_signal_before_the_job_has_begun(cluster: Cluster, tmp_path: Path) -> None:
    """While modules are imported, which takes long on a busy machine."""
    loading, loaded, ran = tmp_path / "loading", tmp_path / "loaded", tmp_path / "ran"

    def load() -> str:
        import os

        if not loading.exists():
            loading.write_text(f"{os.getpid()}\n", encoding="utf-8")
            while not loaded.exists():
                time.sleep(0.1)
        return "x"

    class LoadedSlowly:
        def __reduce__(self) -> Any:
            return load, ()

    job_id, folder = submit("early", [(ran.write_text, (LoadedSlowly(),))], tmp_path, ONE_TASK)
    assert wait_for(lambda: loading.exists() and loading.read_text().endswith("\n"), 60)
    cluster.run("scancel", "--signal=USR2", job_id)
    status, bit = Path(f"/proc/{loading.read_text().strip()}/status"), 1 << (Signals.SIGUSR2 - 1)
    assert wait_for(lambda: bool(int(re.findall(r"ShdPnd:\s*(\w+)", status.read_text("utf-8"))[0], 16) & bit), 60)
    loaded.touch()
    job = cluster.wait(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(folder)
    assert ran.read_text() == "x"


def test_signal_while_one_task_runs_and_another_still_starts(cluster: Cluster, tmp_path: Path) -> None:
    """Longer than SLURM leaves tasks that are told to end (KillWait)."""
    starting, running, ran = tmp_path / "starting", tmp_path / "running", tmp_path / "ran"

    def load() -> str:
        import os

        if os.environ["SLURM_PROCID"] == "1" and not starting.exists():
            starting.touch()
            time.sleep(15)
        return "x"

    class LoadedSlowly:
        def __reduce__(self) -> Any:
            return load, ()

    def run(text: str) -> None:
        if not running.exists():
            running.touch()
            time.sleep(100)
        ran.write_text(text, encoding="utf-8")

    job_id, folder = submit("skewed", [(run, (LoadedSlowly(),))], tmp_path, TWO_TASKS, max_restarts=1)
    assert wait_for(lambda: starting.exists() and running.exists(), 60)
    cluster.run("scancel", "--signal=USR2", job_id)
    job = cluster.wait(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(folder)
    assert ran.read_text() == "x"


def test_signal_before_python_can_handle_it(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the interpreter starts, which takes long where its files are far away."""
    signals = ("USR2", "TERM")
    code = f"""
import os, pathlib, time
if "SLURM_PROCID" in os.environ:
    starting = pathlib.Path({str(tmp_path)!r}, os.environ["SLURM_JOB_NAME"] + ".starting")
    if not starting.exists():
        starting.touch()
        time.sleep(60)
"""
    (tmp_path / "sitecustomize.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    jobs = {name: submit(name, [((tmp_path / f"{name}.ran").touch, ())], tmp_path, ONE_TASK) for name in signals}
    for name, (job_id, _) in jobs.items():
        assert wait_for((tmp_path / f"{name}.starting").exists, 60)
        cluster.run("scancel", f"--signal={name}", job_id)
    for name, (job_id, folder) in jobs.items():
        job = cluster.wait(job_id)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(folder)
        assert (tmp_path / f"{name}.ran").exists()


def test_task_that_fails_ends_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """srun stops the others by the signal of a preemption, and reports the highest status."""

    def fail() -> None:
        import os

        from spidr.tools.errors import InputError

        if os.environ["SLURM_PROCID"] == "1":
            raise InputError("x.csv: no such manifest")
        time.sleep(60)

    job_id, folder = submit("fails", [(fail, ())], tmp_path, TWO_TASKS, max_restarts=1)
    job = cluster.wait(job_id)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), logs(folder)


def test_task_that_ends_slowly_does_not_change_the_status(cluster: Cluster, tmp_path: Path) -> None:
    """srun kills it as soon as another task ends with a non-zero status."""
    begun = [tmp_path / "0", tmp_path / "1"]

    def stop() -> None:
        import builtins
        import os

        class EndsSlowly:
            def __del__(self, sleep: Any = time.sleep) -> None:
                sleep(3)

        rank = int(os.environ["SLURM_PROCID"])
        if begun[rank].exists():
            return
        from spidr.environment import Preempted

        begun[rank].touch()
        while not all(file.exists() for file in begun):
            time.sleep(0.1)
        if rank == 1:
            builtins.slow = EndsSlowly()  # type: ignore[attr-defined]
        raise Preempted(0)

    job_id, folder = submit("slow", [(stop, ())], tmp_path, SlurmConfig(account="a", nodes=1, gpus_per_node=2))
    job = cluster.wait(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), logs(folder)


def test_cancelled_job_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    """SLURM sends the same signal to a cancelled job as to a preempted one."""
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

    job_id, folder = submit("cancelled", [(train, ())], tmp_path, ONE_TASK)
    assert wait_for(running.exists, 60)
    cluster.run("scancel", job_id)
    job = cluster.wait(job_id)
    assert job["JobState"] == "CANCELLED"
    assert wait_for(lambda: "is not queued again" in logs(folder), 60), logs(folder)
    assert (cluster.job(job_id)["JobState"], job["Restarts"]) == ("CANCELLED", "0")


def test_submitit_reads_the_results(cluster: Cluster, tmp_path: Path) -> None:
    import submitit

    job_id, folder = submit("adds", [(sum, ([1, 2],)), (int, ("x",))], tmp_path, ONE_TASK)
    for index in (0, 1):
        cluster.wait(f"{job_id}_{index}")
    added, failed = (submitit.SlurmJob(folder / "%j", f"{job_id}_{index}") for index in (0, 1))
    assert added.result() == 3
    assert added.submission().args == ([1, 2],)
    assert "invalid literal for int()" in str(failed.exception())
    assert "invalid literal for int()" in failed.stderr()


def test_a_function_without_a_signal_handler_is_called_again(cluster: Cluster, tmp_path: Path) -> None:
    """As often as allowed."""
    calls = tmp_path / "calls"

    def sleep() -> None:
        with calls.open("a") as file:
            file.write("x")
        time.sleep(100)

    job_id, folder = submit("sleeps", [(sleep, ())], tmp_path, ONE_TASK, max_restarts=1)
    for count in (1, 2):
        assert wait_for(lambda: calls.exists() and len(calls.read_text()) == count, 60), logs(folder)  # noqa: B023
        cluster.run("scancel", "--signal=USR2", job_id)
    job = cluster.wait(job_id)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "75:0", "1"), logs(folder)

"""Programs run from inside a training run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from signal import Signals

import pytest

from helpers.slurm_cluster import is_running, wait_for
from spidr.tools.programs import run_program


def test_streams_and_status() -> None:
    done = run_program(["sh", "-c", "cat; echo $X >&2; exit 3"], environment={"X": "y", "PATH": "/bin"}, text="é\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, "é\n".encode(), b"y\n")


def test_no_such_program() -> None:
    with pytest.raises(FileNotFoundError):
        run_program(["no-such-program"])


def test_all_its_children_end_at_the_limit(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(subprocess.TimeoutExpired):
        run_program(["bash", "-c", f"echo $$ > {pids}; sleep 100 & echo $! >> {pids}; wait"], limit=5)
    started = pids.read_text().split()
    assert len(started) == 2
    assert wait_for(lambda: not any(map(is_running, started)), 200)


RUN_AND_FORK = """
import os, sys, threading, time
from pathlib import Path
from spidr.tools.programs import run_program

def run_many():
    for _ in range(10):
        run_program(["sleep", "0.1"])

thread = threading.Thread(target=run_many)
thread.start()
children = []
while thread.is_alive() and len(children) < 500:
    children.append(os.fork())
    if not children[-1]:
        time.sleep(100)
        os._exit(0)
    time.sleep(0.002)
thread.join(200)
print("held up" if thread.is_alive() else "done", flush=True)
for child in children:
    os.kill(child, 9)
"""


def test_workers_forked_meanwhile_do_not_hold_it_up() -> None:
    """They inherit open files, and live for hours."""
    command = [sys.executable, "-W", "ignore", "-c", RUN_AND_FORK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"


RUN_ONCE = """
import signal, sys
from spidr.tools.programs import run_program

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda *_: None)
print(run_program(["bash", "-c", sys.argv[1]]).stdout.decode(), end="")
"""


def test_signals_to_a_job_do_not_end_it(tmp_path: Path) -> None:
    """A preemption may signal all processes of the group, or all of the job."""
    started, gate = tmp_path / "started", tmp_path / "gate"
    script = f"echo $$ > {started}; until [ -e {gate} ]; do sleep 0.05; done; echo 34"
    command = [sys.executable, "-c", RUN_ONCE, script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert wait_for(lambda: started.exists() and started.read_text().endswith("\n"), 200)
        for number in (Signals.SIGTERM, Signals.SIGUSR1, Signals.SIGUSR2, Signals.SIGINT):
            os.killpg(process.pid, number)
            os.kill(int(started.read_text()), number)
        gate.touch()
        assert process.communicate() == ("34\n", None)
    assert process.returncode == 0

"""How commands end, and what they write to their two streams."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAD = """
import errno, os, sys
from spidr.tools.command import Parser, command, write_result
from spidr.tools.errors import InputError

@command
def main():
    {body}

sys.exit(main())
"""


def run(body: str, redirection: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in its own process, as a shell does."""
    code = HEAD.format(body=body.replace("\n", "\n    "))
    shell = ["bash", "-o", "pipefail", "-c", f'"$0" -c "$1" {redirection}', sys.executable, code]
    return subprocess.run(shell, capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ("return None", 0, ""),
        ("return 3", 3, ""),
        ('raise InputError("x.csv: no such file")', 2, "error: x.csv: no such file\n"),
        ("raise KeyboardInterrupt", 130, "interrupted; run the same command again\n"),
        ('open("/proc/nothing/x", "w")', 2, "error: /proc/nothing/x: No such file or directory\n"),
        ('raise OSError(errno.ENOSPC, "No space left on device")', 2, "error: No space left on device\n"),
    ],
)
def test_ends_with_a_status_and_one_line(body: str, status: int, error: str) -> None:
    done = run(body)
    assert (done.returncode, done.stderr, done.stdout) == (status, error, "")


def test_a_stopped_run_says_why_once() -> None:
    body = "class Stopped(SystemExit):\n    def __str__(self): return 'stopped, to resume'\n"
    done = run(body + "def train(): raise Stopped(75)\ncommand(train)()")
    assert (done.returncode, done.stderr, done.stdout) == (75, "stopped, to resume\n", "")


def test_other_errors_keep_their_traceback() -> None:
    done = run("return 1 / 0")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_stdout_holds_results_only() -> None:
    done = run('print("a library talks")\nwrite_result("1\\n")\nprint("and talks")')
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert done.stderr == "a library talks\nand talks\n"


def test_help_is_a_result_and_ends_with_an_example() -> None:
    done = run('Parser("x", description="d", example="x 1").parse_args(["--help"])')
    assert done.returncode == 0
    assert done.stdout.startswith("usage: x [options]\n")
    assert done.stdout.endswith("\nexample:\n  x 1\n")


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", "2> >(true)"])
def test_closed_standard_error_does_not_end_a_command(closed: str) -> None:
    body = "import time\nfor i in range(20):\n    print(i, file=sys.stderr, flush=True)\n    time.sleep(0.01)\n"
    body += 'write_result("done\\n")'
    done = run(body, closed)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_closed_standard_output_ends_a_command_quietly() -> None:
    done = run('for i in range(100_000):\n    write_result(f"{i}\\n")', "| head -1")
    assert (done.returncode, done.stdout, done.stderr) == (141, "0\n", "")
    assert run('write_result("x\\n")', ">&-").returncode == 0

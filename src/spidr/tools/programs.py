"""Run other programs for a limited time."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from tempfile import TemporaryFile


def run_program(
    command: list[str], *, environment: Mapping[str, str] | None = None, text: str = "", limit: float = 60
) -> subprocess.CompletedProcess[bytes]:
    """Run a program from inside a training run, which forks workers and gets signals meanwhile.

    Its streams are files, since a worker forked meanwhile would inherit pipes and hold them open. It runs in its own
    session and blocks the signals that ask a run to stop, which SLURM sends to all processes of a job. If it takes
    longer than ``limit`` seconds, or this process is interrupted, it is killed with its children.

    Raises:
        OSError: It cannot be started.
        subprocess.TimeoutExpired: It took too long.
    """
    with TemporaryFile() as stdin, TemporaryFile() as stdout, TemporaryFile() as stderr:
        stdin.write(os.fsencode(text))
        stdin.seek(0)
        files = [(os.POSIX_SPAWN_DUP2, file.fileno(), number) for number, file in enumerate((stdin, stdout, stderr))]
        blocked = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
        process = os.posix_spawnp(
            command[0], command, environment or os.environ, file_actions=files, setsid=True, setsigmask=blocked
        )
        deadline, ended, status = time.monotonic() + limit, 0, 0
        try:
            while not ended:  # by polling: signals do not interrupt waitpid once polars is imported
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(command, limit)
                time.sleep(0.02)
                ended, status = os.waitpid(process, os.WNOHANG)
        except BaseException:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise
        outputs = []
        for file in (stdout, stderr):
            file.seek(0)
            outputs.append(file.read())
    return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(status), *outputs)

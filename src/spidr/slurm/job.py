"""What each task of a job runs: ``python spidr/slurm/job.py FOLDER``.

It calls its job's pickled function and writes the result, as submitit does. The signals by which SLURM announces the
end of a job are blocked until the call, since they would kill a task that still imports its modules; then they
interrupt a function that does not handle them.
"""

import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PREEMPTED = 75
"""Exit status of a call that a signal has stopped; see :class:`spidr.environment.Preempted`."""


def run_task(folder: Path) -> int:
    """Run this task's call, and return its exit status: 0, or 2 after wrong input.

    It is 0, too, when a signal has stopped the call: after any other, srun would stop the tasks that are still busy. A
    file of the first task then tells the script to requeue the job. Errors of the call are raised.
    """
    import cloudpickle
    from submitit.helpers import DelayedSubmission

    from spidr.tools.command import lasting_stderr
    from spidr.tools.errors import InputError

    environ = os.environ
    index, rank = environ.get("SLURM_ARRAY_TASK_ID"), environ["SLURM_PROCID"]
    job = environ["SLURM_JOB_ID"] if index is None else f"{environ['SLURM_ARRAY_JOB_ID']}_{index}"
    environ["SUBMITIT_FOLDER"] = str(folder / job)
    call = folder / f"call_{index or 0}.pkl"
    with suppress(FileExistsError):
        (folder / job / f"{job}_submitted.pkl").symlink_to(call)

    def write_down(status: str, result: object) -> None:
        aside = folder / job / f".{job}_{rank}_result.tmp"
        aside.write_bytes(cloudpickle.dumps((status, result)))
        aside.replace(folder / job / f"{job}_{rank}_result.pkl")

    restart = environ.get("SLURM_RESTART_COUNT", 0)
    stopped, failed = (folder / job / f".{restart}_{end}" for end in ("stopped", "failed"))  # the script looks for them
    with lasting_stderr():
        try:
            try:
                submitted = DelayedSubmission.load(call)
                for number in SIGNALS:
                    signal.signal(number, _stop)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                result = submitted.result()
            finally:
                for number in SIGNALS:  # one that comes while this process ends must not change its status
                    signal.signal(number, signal.SIG_IGN)
            write_down("success", result)
        except SystemExit as end:
            if end.code != PREEMPTED:
                if end.code:
                    failed.touch()
                raise
            if rank == "0":
                sys.stderr.write(f"{end}\n")
                stopped.touch()
        except Exception as error:
            failed.touch()
            write_down("error", traceback.format_exc())
            if not isinstance(error, InputError):
                raise
            sys.stderr.write(f"error: {error}\n")
            return 2
    return 0


class _StoppedError(SystemExit):
    def __init__(self, signum: int) -> None:
        super().__init__(PREEMPTED)
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"


def _stop(signum: int, _: object) -> NoReturn:
    raise _StoppedError(signum)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(run_task(Path(sys.argv[1])))

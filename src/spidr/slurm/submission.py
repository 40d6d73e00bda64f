"""The sbatch command, its script, and the job folder."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spidr.config import SlurmConfig
from spidr.slurm.code import PACKAGE
from spidr.tools.errors import InputError
from spidr.tools.programs import run_program

Call = tuple[Callable[..., object], Sequence[Any]]  # a function and its positional arguments
LIMIT = 60.0  # seconds to wait for a busy controller

SCRIPT = """\
#!/bin/bash
# On SLURM's signals, the tasks save and end; then the job is requeued.
trap : TERM USR1 USR2
mkdir -p {folder}/"{job}"
{srun}
status=$?
ends={folder}/"{job}"/.${{SLURM_RESTART_COUNT:-0}}
# The signals stopped the tasks in good order, or came while Python started.
if [[ $status = 0 && -e ${{ends}}_stopped || $status =~ ^1(38|40|43)$ && ! -e ${{ends}}_failed ]]; then
  status=75
fi
for pause in 0 5 5 5 5 5 5 5 5 5; do
  [ "$status" = 75 ]{limit} || break
  sleep "$pause"
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) || continue
  if [ "$state" != RUNNING ]; then  # cancelled, or out of time
    echo "job $SLURM_JOB_ID is not queued again, its state is $state" >&2
    break
  fi
  scontrol requeue "$SLURM_JOB_ID" && break
done
exit "$status"
"""


class NoAnswerError(InputError):
    """sbatch did not answer: the job may or may not have been submitted."""


@dataclass(frozen=True)
class Submission:
    """A job, or an array of them."""

    name: str
    folder: Path
    command: list[str]  # the sbatch command, which reads the script from standard input
    script: str  # the script, which runs on the first node of each job


def prepare(
    name: str, count: int, folder: Path, slurm: SlurmConfig, *, copy_code: bool = False, max_restarts: int | None = None
) -> Submission:
    """Assemble a submission of ``count`` jobs, without running or writing anything."""
    job, variable = ("%j", "$SLURM_JOB_ID") if count == 1 else ("%A_%a", "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID")
    name = re.sub(r"[^\w.,:=+@-]+", "_", name)[:128]
    options = {
        "job-name": name,
        "account": slurm.account or None,
        "nodes": slurm.nodes,
        "ntasks-per-node": slurm.gpus_per_node,
        "gpus-per-node": slurm.gpus_per_node,
        "cpus-per-task": slurm.cpus_per_task,
        "mem-per-gpu": slurm.mem_per_gpu,
        "time": slurm.time,
        "constraint": slurm.constraint,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "array": f"0-{count - 1}" if count > 1 else None,
        # Seconds before the time limit, enough for a step and a checkpoint; SLURM may be a minute early.
        "signal": f"USR2@{min(120, 15 * slurm.time) if slurm.time else 120}",
    }
    pattern = str(folder).replace("%", "%%")
    # SLURM's own messages. A job whose log is in a missing folder would fail.
    command = ["sbatch", "--parsable", "--requeue", "--open-mode=append", f"--output={pattern}/{job}_slurm.log"]
    command += [f"--{name}={value}" for name, value in options.items() if value is not None]
    log = f"{pattern}/{job}/{job}_%t_log"
    srun = ["srun", "--unbuffered", "--kill-on-bad-exit=1", "--open-mode=append"]
    srun += [f"--output={log}.out", f"--error={log}.err"]
    if slurm.cpus_per_task:  # since SLURM 22.05, srun does not inherit it from sbatch
        srun.append(f"--cpus-per-task={slurm.cpus_per_task}")
    # Run this very package, whatever is in the current folder (-P) or installed.
    package = folder / "code" / PACKAGE.name if copy_code else PACKAGE
    python = [sys.executable, "-P", "-u", str(package / "slurm" / "job.py"), str(folder)]
    limit = "" if max_restarts is None else f' && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_restarts} ]'
    quoted = shlex.quote(str(folder))
    script = SCRIPT.format(folder=quoted, job=variable, srun=shlex.join(srun + python), limit=limit)
    return Submission(name, folder, command, script)


def sbatch(submission: Submission) -> str:
    """Hand a submission to SLURM, and return the job id. Raises InputError if SLURM refuses it or does not answer."""
    try:
        done = run_program(submission.command, environment=clean_environment(), text=submission.script, limit=LIMIT)
    except OSError as error:
        raise InputError(
            f"sbatch cannot be run: {error.strerror}. Is this machine part of a SLURM cluster?", guide="slurm.md"
        ) from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(
            f"sbatch has not answered for {LIMIT:.0f} s and was killed. The job may have been submitted anyway: "
            f"look with `squeue --me --name={submission.name}` before you submit it again. Its folder is "
            f"{submission.folder}"
        ) from None
    if done.returncode:
        said = "; ".join(line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip())
        raise InputError(f"sbatch refused the job: {said or f'exit status {done.returncode}'}", guide="slurm.md")
    return done.stdout.decode().strip().split(";")[0]


def clean_environment() -> dict[str, str]:
    """This process's environment without the variables of an enclosing job, which SLURM would obey, or of torchrun."""
    prefixes = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "TORCHELASTIC_")
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
    kept = (n for n in os.environ if n == "SLURM_CONF" or not (n.startswith(prefixes) or n in ranks))
    return {name: os.environ[name] for name in kept}


def job_state(job_id: str) -> str | None:
    """State of a pending or running job; "" once it has ended, None if SLURM does not answer."""
    try:
        asked = run_program(["squeue", "--noheader", f"--jobs={job_id}", "--format=%T"])
    except (OSError, subprocess.TimeoutExpired):
        return None
    if asked.returncode == 0:
        return asked.stdout.decode().strip()
    return "" if b"Invalid job id" in asked.stderr else None


def job_folders(dump: str | Path, job_name: str) -> Iterator[Path]:
    """Yield names for the job folder, endlessly, the best first. Raises InputError if SLURM cannot log there."""
    dump = Path(dump).expanduser().absolute()
    if found := re.search(r"%[jtAa]|\\", str(dump)):
        raise InputError(f"{dump}: {found[0]} has a meaning of its own in SLURM's paths; choose another folder")
    name = re.sub(r"[/\\%\0]", "_", job_name)
    name = "_" if name in ("", ".", "..") else name
    yield dump / name
    while True:
        yield dump / f"{name}_{datetime.now(UTC):%Y%m%d-%H%M%S}"


def make_job_folder(dump: str | Path, job_name: str) -> Path:
    """Create a new job folder. Raises InputError if that fails."""
    folders = job_folders(dump, job_name)
    while True:
        folder = next(folders)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.parent.is_dir():
                raise InputError(f"--dump {folder.parent}: not a folder") from None
            time.sleep(0.1)
        except OSError as error:
            raise InputError(f"{folder}: cannot make the job folder: {error.strerror}; choose another --dump") from None

"""Jobs on SLURM: training launched from the command line, validation submitted from inside a training run.

submitit runs a job: each of its tasks loads a pickled call from the job folder and logs there. The submission itself is
ours, because submitit writes names and options into ``#SBATCH`` lines, where a line break in one of them would hand the
rest to the shell. Here they are arguments of ``sbatch``, no shell in between, and everything in the script is quoted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from spidr.config import Config, ResumeConfig, SlurmConfig
from spidr.tools.errors import InputError
from spidr.tools.files import make_folder
from spidr.tools.lazy import needs_extra
from spidr.tools.metrics import read_metrics
from spidr.tools.untrusted import read_table

logger = logging.getLogger(__name__)

Call = tuple[Callable[..., object], Sequence[Any]]
"""A function and its positional arguments."""

RUN = """\
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR2])
from submitit.core.submission import submitit_main
sys.path.insert(0, sys.argv.pop(1))
submitit_main()
"""
"""What each task of a job runs. It would die of a signal that comes while the call's modules are being imported, before
submitit handles any: until :class:`Job` begins, signals wait."""
SUBMITTING = "validation"  # how the names of threads that submit begin
PACKAGE = Path(__file__).resolve().parent
PRESET_KEYS = ("time", "cpus_per_task", "mem_per_gpu", "constraint", "partition", "qos")


def launch_with_submitit(
    job_name: str, jobs: Sequence[Call], dump: str | Path, slurm: SlurmConfig, *, copy_code: bool
) -> bool:
    """Submit calls to SLURM, several as one job array. Never raises for what SLURM or the user's settings refuse.

    Args:
        job_name: Name of the job and of its folder in ``dump``.
        jobs: What each job of the array runs, in every task: ``function(*args)``, pickled. There is one task per GPU.
        dump: Folder on a file system that the nodes share.
        slurm: What to ask for.
        copy_code: Whether the jobs, requeued ones too, run a copy of the package made now.

    Returns:
        Whether everything was submitted. Otherwise the reason is logged as an error, and no job folder is left.
    """
    try:
        submit(job_name, jobs, dump, slurm, copy_code=copy_code)
    except InputError as error:
        logger.error("%s", error)
        return False
    return True


# --------------------------------------------------------------------------------------------------------------------
# Submitting


@dataclass(frozen=True)
class Submission:
    """A job, or an array of them, as SLURM gets it.

    Attributes:
        folder: The job folder.
        command: The ``sbatch`` command line; it reads the script from its standard input.
        script: What runs on the first node of each job.
    """

    folder: Path
    command: list[str]
    script: str


def submit(
    job_name: str,
    jobs: Sequence[Call],
    dump: str | Path,
    slurm: SlurmConfig,
    *,
    copy_code: bool,
    max_timeouts: int = sys.maxsize,
) -> tuple[str, Path]:
    """As :func:`launch_with_submitit`, whose arguments these are, but says what came of it.

    ``max_timeouts`` is how often a job whose call does not handle its time limit itself starts again after it.

    Returns:
        The job id and the job folder.

    Raises:
        InputError: If the job folder cannot be written or sbatch refuses. Nothing is left behind then.
    """
    with needs_extra("train"):
        from submitit.core.utils import DelayedSubmission, JobPaths
    launch_time = datetime.now(UTC)
    folder = _make_job_folder(dump, job_name, launch_time)
    try:
        if copy_code:
            shutil.copytree(PACKAGE, folder / "code" / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
        info = {"job_name": job_name, "launch_time": launch_time.isoformat(timespec="seconds")}
        (folder / "job-info.json").write_text(json.dumps(info | dataclasses.asdict(slurm), indent=2) + "\n")
        for name, text in describe_checkout(PACKAGE).items():
            (folder / name).write_bytes(text)
        pickles = [folder / f".{index}.pkl" for index in range(len(jobs))]
        for (function, args), pickle in zip(jobs, pickles, strict=True):
            call = DelayedSubmission(Job(function, tuple(args)))
            call.set_timeout(slurm.time or sys.maxsize, max_timeouts)
            call.dump(pickle)
        submission = prepare(job_name, len(jobs), folder, slurm, copy_code=copy_code)
        job_id = _sbatch(submission)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"{folder}: cannot write the job folder: {error.strerror}") from error
        raise
    # A job that starts before its pickle is there waits for it.
    ids = [job_id] if len(jobs) == 1 else [f"{job_id}_{index}" for index in range(len(jobs))]
    for name, pickle in zip(ids, pickles, strict=True):
        JobPaths(folder / "%j", name).move_temporary_file(pickle, "submitted_pickle")
    JobPaths(folder / "%j", ids[0]).submission_file.write_text(submission.script)
    logger.info("submitted job %s (%s)", job_id, folder)
    return job_id, folder


def prepare(job_name: str, count: int, folder: Path, slurm: SlurmConfig, *, copy_code: bool) -> Submission:
    """Write down a submission of ``count`` jobs; nothing is run or written."""
    job, variable = ("%j", "$SLURM_JOB_ID") if count == 1 else ("%A_%a", "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID")
    options = {
        "job-name": re.sub(r"[^\w.,:=+@-]+", "_", job_name)[:128],
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
        # So long before the time limit; SLURM may be up to a minute early. Enough for a step and a checkpoint.
        "signal": f"USR2@{min(120, 15 * slurm.time) if slurm.time else 120}",
    }
    pattern = str(folder).replace("%", "%%")
    # SLURM's own messages; a job whose log is in a folder that is yet to be made would fail to start.
    command = ["sbatch", "--parsable", "--requeue", "--open-mode=append", f"--output={pattern}/{job}_slurm.log"]
    command += [f"--{name}={value}" for name, value in options.items() if value is not None]
    log = f"{pattern}/{job}/{job}_%t_log"
    srun = ["srun", "--unbuffered", "--kill-on-bad-exit=1", "--open-mode=append"]
    srun += [f"--output={log}.out", f"--error={log}.err"]
    if slurm.cpus_per_task:  # srun has not taken it from sbatch since SLURM 22.05
        srun.append(f"--cpus-per-task={slurm.cpus_per_task}")
    # The package that runs is the one given here, whatever lies in the current folder (-P) or is installed.
    code = folder / "code" if copy_code else PACKAGE.parent
    python = [sys.executable, "-P", "-u", "-c", RUN, str(code), f"{folder}/%j"]
    script = f"""\
#!/bin/bash
export SUBMITIT_EXECUTOR=slurm
mkdir -p {shlex.quote(str(folder))}/"{variable}"
{shlex.join(srun + python)}
"""
    return Submission(folder, command, script)


def _sbatch(submission: Submission) -> str:
    """Hand a submission to SLURM. Returns the job id."""
    try:
        done = run_apart(submission.command, clean_environment(), submission.script)
    except OSError as error:
        raise InputError(f"sbatch cannot be run: {error.strerror}. Is this a machine of a SLURM cluster?") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines()
        said = "; ".join(line.strip() for line in lines if line.strip())
        raise InputError(f"sbatch refused the job: {said or f'exit status {done.returncode}'}")
    return done.stdout.decode().strip().split(";")[0]


def run_apart(command: list[str], environment: Mapping[str, str], text: str = "") -> subprocess.CompletedProcess[bytes]:
    """Run a program from inside a training run, which forks workers and gets signals while the program runs.

    A worker forked meanwhile would inherit the pipes to and from the program, those of :mod:`subprocess` itself too,
    and hold them open for as long as it lives: here are files, and nothing to wait for but the program's end. It has a
    session of its own and blocks the signals that ask a run to stop: SLURM sends those to all processes of a job.

    Args:
        command: The program, found on the path, and its arguments.
        environment: Its environment.
        text: Its standard input.

    Raises:
        OSError: It cannot be run.
    """
    with TemporaryFile() as stdin, TemporaryFile() as stdout, TemporaryFile() as stderr:
        stdin.write(os.fsencode(text))
        stdin.seek(0)
        files = [(os.POSIX_SPAWN_DUP2, file.fileno(), number) for number, file in enumerate((stdin, stdout, stderr))]
        blocked = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
        process = os.posix_spawnp(command[0], command, environment, file_actions=files, setsid=True, setsigmask=blocked)
        try:
            ended, status = 0, 0
            while not ended:  # in small pieces, since signals do not interrupt waitpid once polars has been imported
                time.sleep(0.02)
                ended, status = os.waitpid(process, os.WNOHANG)
        except BaseException:  # Ctrl-C in a terminal, which the program does not see
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise
        outputs = []
        for file in (stdout, stderr):
            file.seek(0)
            outputs.append(file.read())
    return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(status), *outputs)


def clean_environment() -> dict[str, str]:
    """This process's environment without what an enclosing job or torchrun has put there about itself.

    SLURM would otherwise take the enclosing job's memory, GPUs and tasks for the new one's.
    """
    prefixes = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "TORCHELASTIC_")
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
    return {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not (name.startswith(prefixes) or name in ranks)
    }


# --------------------------------------------------------------------------------------------------------------------
# The job folder


def job_folders(dump: str | Path, job_name: str, launch_time: datetime) -> Iterator[Path]:
    """Names for the job folder, the best first. Endless.

    Raises:
        InputError: If SLURM could not write logs there.
    """
    dump = Path(dump).absolute()
    if found := re.search(r"%[jtAa]|\\", str(dump)):
        raise InputError(f"{dump}: {found[0]} has a meaning of its own in SLURM's paths; choose another folder")
    name = re.sub(r"[/\\%\0]", "_", job_name)
    name = "_" if name in ("", ".", "..") else name
    yield dump / name
    while True:
        yield dump / f"{name}_{launch_time:%Y%m%d-%H%M%S}"
        launch_time = datetime.now(UTC)


def _make_job_folder(dump: str | Path, job_name: str, launch_time: datetime) -> Path:
    for folder in job_folders(dump, job_name, launch_time):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.parent.is_dir():
                raise InputError(f"--dump {folder.parent}: not a folder") from None
            time.sleep(0.1)
        except OSError as error:
            raise InputError(f"{folder}: cannot make the job folder: {error.strerror}; choose another --dump") from None
        else:
            return folder
    raise AssertionError


def describe_checkout(folder: Path) -> dict[str, bytes]:
    """What is needed to find the code in ``folder`` again: files for the job folder.

    Returns:
        ``git-info.txt`` with branch and commit and ``git-diff.patch`` with all changes since, if git tracks the code;
        nothing for an installed package, even one whose environment lies inside some checkout.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*args: str) -> bytes:
        done = run_apart(["git", "-C", str(folder), *args], environment)
        done.check_returncode()
        return done.stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        branch, commit = git("rev-parse", "--abbrev-ref", "HEAD"), git("rev-parse", "HEAD")
        return {"git-info.txt": b"branch: %scommit: %s" % (branch, commit), "git-diff.patch": git("diff", "HEAD")}
    except (OSError, subprocess.CalledProcessError):
        return {}


def is_installed() -> bool:
    """Whether the package that runs is an installed copy, which stays as it is, rather than someone's working tree."""
    return not {"site-packages", "dist-packages"}.isdisjoint(PACKAGE.parts)


# --------------------------------------------------------------------------------------------------------------------
# Inside a job


@dataclass(frozen=True)
class Job:
    """What submitit runs in every task of a job: a call that goes back into the queue when it is told to stop."""

    function: Callable[..., object]
    args: tuple[Any, ...]

    def __call__(self) -> None:
        """Run the call.

        Raises:
            SystemExit: With status 0 once this job is queued again, 2 after wrong input, else as the call itself.
        """
        from spidr.environment import Preempted

        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGUSR2])
        try:
            self.function(*self.args)
        except Preempted:
            for thread in threading.enumerate():
                if thread.name.startswith(SUBMITTING):
                    thread.join(30)  # requeueing ends it
            # Only after a status of 0 does srun leave the first process the time to requeue.
            if int(os.environ["SLURM_PROCID"]) == 0 and not requeue(os.environ["SLURM_JOB_ID"]):
                raise
            raise SystemExit(0) from None
        except InputError as error:
            sys.stderr.write(f"error: {error}\n")
            raise SystemExit(2) from None

    def checkpoint(self) -> Any:
        """What submitit runs after it has requeued the job on a signal that came before the call could handle it."""
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self)


def requeue(job_id: str, *, attempts: int = 10) -> bool:
    """Put a running job back into the queue; it keeps its id and starts again with the same command.

    A job that its user has cancelled or that has run out of time also gets SIGTERM, but is no longer running: it stays
    ended.

    Args:
        job_id: The job, which is this process's own.
        attempts: How often to ask a controller that does not answer.

    Returns:
        Whether it was requeued.
    """
    state, error = None, ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(5)
        state = _job_state(job_id)
        if state not in (None, "RUNNING"):
            break
        if state:
            done = run_apart(["scontrol", "requeue", job_id], os.environ)
            if done.returncode == 0:
                logger.info("job %s goes back into the queue", job_id)
                return True
            error = done.stderr.decode(errors="replace").strip()
    logger.warning("job %s is not requeued, its state is %s. %s", job_id, state or "unknown", error)
    return False


def _job_state(job_id: str) -> str | None:
    """A job's state if it waits or runs, "" once it has ended, None if SLURM does not answer."""
    command = ["squeue", "--noheader", f"--jobs={job_id}", "--format=%T"]
    try:
        asked = run_apart(command, os.environ)
    except OSError:
        return None
    if asked.returncode == 0:
        return asked.stdout.decode().strip()
    return "" if b"Invalid job id" in asked.stderr else None


# --------------------------------------------------------------------------------------------------------------------
# Validation jobs


def validates_in_jobs(cfg: Config) -> bool:
    """Whether validation runs in jobs of its own: if training is a SLURM job, or ``run.slurm_validation`` says so."""
    return cfg.run.slurm_validation is not None or "SLURM_STEP_ID" in os.environ


def validation_slurm(cfg: Config) -> SlurmConfig:
    """What a validation job asks for: ``run.slurm_validation``, else an hour of a GPU on the training job's account."""
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")
    return cfg.run.slurm_validation or SlurmConfig(
        account=os.environ.get("SLURM_JOB_ACCOUNT", ""),
        nodes=1,
        gpus_per_node=1,
        time=60,
        cpus_per_task=int(cpus) if cpus else None,
    )


class ValidationJobs:
    """The validations of a run that are done in jobs of their own, as files of the folder ``RUN/validation``.

    ``step_N.pending`` stands for a job that is being submitted (empty), waits or runs (its id), ``step_N.jsonl`` for
    results that have not been collected. So a restarted run, or ``python -m spidr.tools.metrics_queue`` after its end,
    knows as much as the process that submitted. One process at a time may use a run's. Submitting happens in a thread
    and leaves the environment and the current folder of this process as they are.

    Args:
        run_dir: The run folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "validation"
        for marker in self.folder.glob("step_*.pending"):
            if not marker.stat().st_size:  # a process died while it submitted
                marker.unlink()

    def submit(self, cfg: Config, step: int, checkpoint: Path) -> threading.Thread:
        """Submit the validation of a checkpoint on every validation set, without making the caller wait.

        The job calls :func:`spidr.validate.run_validation`. If it cannot be submitted, an error is logged.

        Args:
            cfg: The run's configuration, with the model's settings as they are trained.
            step: The checkpoint's step.
            checkpoint: Its file, which must stay while the step is in :meth:`pending`.

        Returns:
            The thread that submits. The interpreter waits for it before it ends.
        """
        make_folder(self.folder)
        self._pending(step).touch()
        resume = ResumeConfig(step, str(checkpoint), str(self._results(step)))
        # Read now: the environment may be another one when the thread gets to it.
        arguments = (cfg, resume, validation_slurm(cfg))
        thread = threading.Thread(target=self._submit, args=arguments, name=f"{SUBMITTING} of step {step}")
        thread.start()
        return thread

    def pending(self) -> set[int]:
        """Steps whose job has been submitted and has neither given results nor failed."""
        return self._steps(".pending") - self._steps(".jsonl")

    def collect(self) -> Iterator[dict[str, Any]]:
        """The lines for ``metrics.jsonl`` that have come in, in the order of their steps.

        Results of a later step wait until the earlier ones are there or their jobs are known to have failed. A results
        file is removed when the caller comes back for more after its last line, so that none is lost in between.
        """
        waiting = min(self.pending(), default=sys.maxsize)
        for step in sorted(self._steps(".jsonl")):
            if step > waiting:
                return
            yield from read_metrics(self._results(step))
            self._pending(step).unlink(missing_ok=True)
            self._results(step).unlink()

    def forget_lost(self) -> None:
        """Stop waiting for jobs that ended without results: cancelled, out of memory, on a machine that died."""
        for step in self.pending():
            job_id = self._pending(step).read_text()
            if job_id and _job_state(job_id) == "" and not self._results(step).exists():
                logger.error(
                    "step %d is not validated: job %s ended without results, see %s", step, job_id, self.folder
                )
                self._pending(step).unlink(missing_ok=True)

    def _submit(self, cfg: Config, resume: ResumeConfig, slurm: SlurmConfig) -> None:
        marker = self._pending(resume.step)
        try:
            self.forget_lost()
            job_id, _ = submit(
                f"{cfg.run.wandb_name}-step{resume.step}",
                [(_validate, (cfg, resume, marker))],
                self.folder,
                slurm,
                copy_code=False,
                max_timeouts=3,
            )
            if marker.exists():  # not if the job is done already
                marker.write_text(job_id)
        except Exception as error:
            marker.unlink(missing_ok=True)
            reason = error if isinstance(error, InputError) else repr(error)
            logger.error("step %d is not validated: %s", resume.step, reason)

    def _pending(self, step: int) -> Path:
        return self.folder / f"step_{step}.pending"

    def _results(self, step: int) -> Path:
        return self.folder / f"step_{step}.jsonl"

    def _steps(self, suffix: str) -> set[int]:
        names = (re.fullmatch(rf"step_(\d+){re.escape(suffix)}", path.name) for path in self.folder.glob("step_*"))
        return {int(name[1]) for name in names if name}


def _validate(cfg: Config, resume: ResumeConfig, marker: Path) -> None:
    """What a validation job runs."""
    from spidr.validate import run_validation

    try:
        run_validation(cfg, resume)
    except Exception:
        marker.unlink(missing_ok=True)
        raise


# --------------------------------------------------------------------------------------------------------------------
# Cluster presets


def cluster_preset() -> dict[str, Any]:
    """The SLURM settings that ``$SPIDR_CLUSTER`` names, empty if it is not set.

    They come from ``$SPIDR_CLUSTERS_FILE`` (default ``~/.config/spidr/clusters.toml``) over ``clusters.toml`` of the
    package.

    Raises:
        InputError: If no file has that cluster, or it has a wrong setting.
    """
    name = os.environ.get("SPIDR_CLUSTER")
    if not name:
        return {}
    given = os.environ.get("SPIDR_CLUSTERS_FILE")
    own = Path(given) if given else Path.home() / ".config" / "spidr" / "clusters.toml"
    tables = read_table(PACKAGE / "clusters.toml")
    for cluster, table in (read_table(own) if given or own.exists() else {}).items():
        if not isinstance(table, dict):
            raise InputError(f"{own}: {cluster}: found {table!r}, accepted: a table [{cluster}] of SLURM settings")
        tables[cluster] = tables.get(cluster, {}) | table
    if name not in tables:
        raise InputError(f"SPIDR_CLUSTER: no cluster {name!r} in {own}; known: {', '.join(sorted(tables))}")
    preset: dict[str, Any] = tables[name]
    if unknown := preset.keys() - set(PRESET_KEYS):
        raise InputError(f"{own}: {name}.{min(unknown)}: unknown key, accepted: {', '.join(PRESET_KEYS)}")
    try:
        SlurmConfig(account="", nodes=1, gpus_per_node=1, **preset)
    except InputError as error:
        raise InputError(f"{own}: [{name}]: {error}") from None
    return preset

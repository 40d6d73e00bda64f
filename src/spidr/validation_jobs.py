"""Validation in separate SLURM jobs: submit them, collect late results, and push them to wandb."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock as ThreadLock, Thread
from typing import NamedTuple

from spidr.config import Config, ResumeConfig, SlurmConfig, read_config, to_dict
from spidr.slurm.launch import submit
from spidr.slurm.presets import validation_job_config
from spidr.slurm.submission import job_state
from spidr.tools.command import Parser, command, write_result
from spidr.tools.errors import InputError, first_line
from spidr.tools.files import make_folder, write_json
from spidr.tools.lock import Lock
from spidr.tools.metrics import Line, MetricsFile, read_metrics
from spidr.tools.untrusted import parse_json
from spidr.tools.wandb import WandbSink, find_wandb_run, import_wandb, wandb_mode

logger = logging.getLogger(__name__)


def validates_in_jobs(cfg: Config) -> bool:
    """Whether validation runs in separate jobs: in a SLURM job, or if ``run.slurm_validation`` is set."""
    return cfg.run.slurm_validation is not None or "SLURM_STEP_ID" in os.environ


class ValidationJobs:
    """The validation jobs of a run, as files in ``RUN/validation``.

    ``step_N.pending`` names a job's checkpoint, id and log; ``step_N.failed`` says why it gave no results;
    ``step_N.jsonl`` holds results to collect. So a restarted run, or ``spidr metrics`` after its end, knows as much as
    the process that submitted. Only one process at a time may use them. Jobs are submitted from threads.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "validation"
        self._threads: dict[int, Thread] = {}
        self._collecting = ThreadLock()
        self._told: set[int] = set()

    def submit(self, cfg: Config, step: int, checkpoint: Path) -> None:
        """Submit, in the background, the validation of a step's checkpoint, which must be kept while :meth:`needed`."""
        make_folder(self.folder)
        self._write(step, ".pending", checkpoint=str(checkpoint), job="")
        self._path(step, ".failed").unlink(missing_ok=True)
        self._told.discard(step)
        # Read the environment now; the thread might find another one.
        slurm = cfg.run.slurm_validation or validation_job_config()
        resume = ResumeConfig(step, str(checkpoint), str(self._path(step, ".jsonl")))
        self._threads[step] = Thread(target=self._submit, args=(cfg, resume, slurm))
        self._threads[step].start()

    def submit_again(self, cfg: Config) -> None:
        """Resubmit failed jobs whose checkpoints still exist."""
        self.find_lost()
        for step in sorted(self.failures()):
            checkpoint = self._read(step, ".pending").get("checkpoint")
            if checkpoint and Path(checkpoint).exists():
                self.submit(cfg, step, Path(checkpoint))

    def _submit(self, cfg: Config, resume: ResumeConfig, slurm: SlurmConfig) -> None:
        try:
            self.find_lost()
            name, step = f"{cfg.run.wandb_name}-step{resume.step}", resume.step
            calls = [(_validate, (cfg, resume, str(self._path(step, ".failed"))))]
            job_id, folder = submit(name, calls, self.folder, slurm, max_restarts=5)  # each time it starts over
            with self._collecting:
                if self._path(step, ".pending").exists():  # unless the job has already ended
                    self._write(step, ".pending", checkpoint=resume.checkpoint, job=job_id, log=_log_of(folder, job_id))
        except Exception as error:
            self._fail(resume.step, str(error) if isinstance(error, InputError) else repr(error))

    def close(self) -> None:
        """Wait until everything is submitted or refused."""
        for thread in self._threads.values():
            thread.join()
        self.report()

    def pending(self) -> set[int]:
        """Steps whose job has neither written results nor failed."""
        return self._steps(".pending") - self._steps(".jsonl") - self._steps(".failed")

    def needed(self) -> set[int]:
        """Steps whose checkpoints must be kept: those without results."""
        return self._steps(".pending") - self._steps(".jsonl")

    def failures(self) -> dict[int, str]:
        """Step → why its job gave no results, and where its log is."""
        failed = sorted(self._steps(".failed") - self._steps(".jsonl"))
        return {step: self._read(step, ".failed").get("reason", "unknown reason") for step in failed}

    def report(self) -> None:
        """Log new failures."""
        for step, reason in self.failures().items():
            if step not in self._told:
                logger.error("step %d is not validated: %s", step, reason)
                self._told.add(step)

    def collect(self) -> Iterator[Line]:
        """Yield new lines for ``metrics.jsonl`` in the order of steps.

        Results of a later step wait for those of earlier ones, unless their jobs have failed. A results file is removed
        only when the caller asks for more after its last line, so that none is lost.
        """
        waiting = min(self.pending(), default=sys.maxsize)
        for step in sorted(self._steps(".jsonl")):
            if step > waiting:
                return
            yield from read_metrics(self._path(step, ".jsonl"))
            with self._collecting:
                for suffix in (".pending", ".failed", ".jsonl"):
                    self._path(step, suffix).unlink(missing_ok=True)

    def find_lost(self) -> None:
        """Mark as failed the jobs that ended silently: cancelled, out of memory, on a machine that died."""
        for step in self.pending():
            job = self._read(step, ".pending")
            if not job.get("job"):
                if step not in self._threads:
                    self._fail(step, "the run ended while the job was submitted")
            elif job_state(job["job"]) == "":
                self._fail(step, f"job {job['job']} ended without results, see {job.get('log', self.folder)}")

    def _fail(self, step: int, reason: str) -> None:
        with self._collecting:
            if step in self.pending():  # else its results have come, or the job has said why
                self._write(step, ".failed", reason=reason)

    def _path(self, step: int, suffix: str) -> Path:
        return self.folder / f"step_{step}{suffix}"

    def _steps(self, suffix: str) -> set[int]:
        paths = self.folder.glob(f"step_*{suffix}")
        return {int(path.stem[5:]) for path in paths if path.stem[5:].isdecimal()}

    def _write(self, step: int, suffix: str, **values: str) -> None:
        write_json(self._path(step, suffix), values)

    def _read(self, step: int, suffix: str) -> dict[str, str]:
        try:
            values = parse_json(self._path(step, suffix).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}


def _log_of(folder: Path, job_id: str) -> str:
    return str(folder / job_id / f"{job_id}_0_log.err")


def _validate(cfg: Config, resume: ResumeConfig, failed: str) -> None:
    """The function that a validation job runs."""
    from spidr.validate import validate_existing_checkpoint

    try:
        validate_existing_checkpoint(cfg, resume)
    except Exception as error:
        job, folder = os.environ["SLURM_JOB_ID"], Path(os.environ["SUBMITIT_FOLDER"]).parent
        write_json(Path(failed), {"reason": f"job {job} failed: {first_line(error)}; see {_log_of(folder, job)}"})
        raise


class Collected(NamedTuple):
    """Number of lines added to ``metrics.jsonl``, steps that failed and why, and steps still pending."""

    lines: int
    failures: dict[int, str]
    pending: set[int]


def collect_metrics(folder: Path) -> Collected:
    """Collect new results of validation, then remove the checkpoints that only they needed.

    Raises:
        InputError: The folder is not a run's, or the run is training.
    """
    if not os.path.isfile(folder / "config.json"):  # noqa: PTH113 (False for all that cannot be a file)
        raise InputError(f"{folder}: not a run folder, it has no config.json")
    with Lock(folder, "is collecting the run's metrics"):
        metrics = MetricsFile(folder / "metrics.jsonl", sys.maxsize)
        jobs = ValidationJobs(folder)
        jobs.find_lost()
        count = sum(metrics.write(line) for line in jobs.collect())
        if count and (run := read_config(folder / "config.json").run).keep_latest > 0:
            from spidr.checkpoint import Checkpointer

            checkpointer = Checkpointer(folder, run.save_interval, run.keep_latest)
            checkpointer.needed = jobs.needed
            checkpointer.remove_old()
        return Collected(count, jobs.failures(), jobs.pending())


def push_metrics(folder: Path, entity: str, run_id: str | None = None) -> int:
    """Push to wandb the lines that it lacks, whatever ``run.wandb_mode`` was. Returns their number.

    The run must not be training. Without ``run_id``, it is the one recorded in the folder, else the one finished run
    with the configuration's project and name. ``entity`` is a user or team.

    Raises:
        InputError: There is not exactly one such run, or wandb does not take the lines.
    """
    import_wandb()
    mode = wandb_mode("online")
    if mode == "disabled":
        raise InputError("nothing is pushed: WANDB_MODE or WANDB_DISABLED in the environment disables wandb")
    cfg = read_config(folder / "config.json")
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines:
        raise InputError(f"{folder / 'metrics.jsonl'}: there is nothing to push")
    project, name = cfg.run.wandb_project, cfg.run.wandb_name
    if run_id is None and not (folder / "wandb.json").exists():
        if mode == "offline":
            raise InputError(f"{folder}: no wandb run is known here; give --runid")
        run_id = find_wandb_run(f"{entity}/{project}", name)
    os.environ["WANDB_ENTITY"] = entity
    sink = WandbSink(folder, project, name, mode, to_dict(cfg), run_id)
    if sink.run is None:
        raise InputError(f"wandb cannot be reached as {entity}/{project}; the reason is above")
    missing = sink.missing(lines)
    for line in missing:
        sink.push(line)
    sink.close()
    if refused := sink.missing(lines):
        raise InputError(f"wandb did not take {len(refused)} of {len(missing)} lines; the reason is above")
    return len(missing)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 1 if a step is not validated because its job failed."""
    parser = Parser(
        "python -m spidr.tools.metrics_queue",
        description="Bring a finished run up to date: collect late results of validation jobs in "
        "metrics.jsonl and, with --entity, push to wandb every line that it lacks.",
        example="python -m spidr.tools.metrics_queue runs/my-project/my-run --entity my-team",
    )
    parser.add_argument("path", type=Path, help="a run's folder, or its metrics.jsonl")
    parser.add_argument("--entity", help="wandb user or team (default: none, nothing is pushed)")
    parser.add_argument("--runid", help="wandb's id of the run (default: the one finished run of that name)")
    args = parser.parse_args(argv)
    if args.runid is not None and args.entity is None:
        parser.error("--runid needs --entity")
    folder = args.path.parent if args.path.name == "metrics.jsonl" else args.path
    found = collect_metrics(folder)
    for step, reason in found.failures.items():
        sys.stderr.write(f"step {step} is not validated: {reason}\n")
    if found.failures:
        sys.stderr.write("rerun the run's own command to repeat them\n")
    if found.pending:
        steps = ", ".join(map(str, sorted(found.pending)))
        sys.stderr.write(f"not validated yet: steps {steps}; run this again later\n")
    if args.entity is not None:
        pushed = push_metrics(folder, args.entity, args.runid)
        write_result(f"{pushed} lines pushed{'' if pushed else ': wandb has all of them'}\n")
    else:
        nothing = ": no validation job has results that are not in metrics.jsonl yet"
        write_result(f"{found.lines} lines collected{'' if found.lines else nothing}\n")
    return 1 if found.failures else 0

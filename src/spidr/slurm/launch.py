"""Submit calls to SLURM."""

import argparse
import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spidr.config import SlurmConfig
from spidr.slurm.code import copy_package, describe_checkout
from spidr.slurm.submission import Call, NoAnswerError, make_job_folder, prepare, sbatch
from spidr.tools.errors import InputError
from spidr.tools.lazy import needs_extra
from spidr.tools.schema import from_table

logger = logging.getLogger(__name__)


def launch_with_submitit(
    job_name: str,
    jobs: Sequence[Call],
    dump: str | Path,
    slurm: SlurmConfig | Mapping[str, Any],
    *,
    copy_code: bool = False,
) -> bool:
    """Submit calls to SLURM, several as one job array.

    A job that is preempted or reaches its time limit is requeued and calls its function again.

    Args:
        job_name: Name of the job and of its folder in ``dump``.
        jobs: (function, arguments) of each job: every task calls ``function(*arguments)``, one task per GPU.
        dump: Folder on a file system that the nodes share.
        slurm: The resources to request.
        copy_code: Whether the jobs, also when requeued, run a copy of the package made now.

    Returns:
        Whether everything was submitted; if not, the reason is logged as an error.
    """
    try:
        submit(job_name, jobs, dump, slurm, copy_code=copy_code)
    except InputError as error:
        logger.error("%s", error)
        return False
    return True


def submit(
    job_name: str,
    jobs: Sequence[Call],
    dump: str | Path,
    slurm: SlurmConfig | Mapping[str, Any],
    *,
    copy_code: bool = False,
    max_restarts: int | None = None,
) -> tuple[str, Path]:
    """Submit as :func:`launch_with_submitit`, and return the job id and the job folder.

    ``max_restarts`` limits how often a job is requeued; None: no limit.

    Raises:
        InputError: The job folder cannot be written, or sbatch refuses. Nothing is left behind unless sbatch did not
            answer, as the job may exist.
    """
    with needs_extra("train"):
        from submitit.helpers import DelayedSubmission
    settings = slurm if isinstance(slurm, SlurmConfig) else from_table(SlurmConfig, slurm)
    folder = make_job_folder(dump, job_name)
    try:
        if copy_code:
            copy_package(folder / "code")
        info = {"job_name": job_name, "launch_time": datetime.now(UTC).isoformat(timespec="seconds")}
        info |= dataclasses.asdict(settings)
        (folder / "job-info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        for name, content in describe_checkout().items():
            (folder / name).write_bytes(content)
        for index, (function, arguments) in enumerate(jobs):
            DelayedSubmission(function, *arguments).dump(folder / f"call_{index}.pkl")
        submission = prepare(job_name, len(jobs), folder, settings, copy_code=copy_code, max_restarts=max_restarts)
        (folder / "submission.sh").write_text(submission.script, encoding="utf-8")
        job_id = sbatch(submission)
    except BaseException as error:
        if not isinstance(error, NoAnswerError):
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"{folder}: cannot write the job folder: {error.strerror}") from error
        raise
    logger.info("submitted job %s (%s)", job_id, folder)
    return job_id, folder


def slurm_config_parse_args(args: argparse.Namespace) -> SlurmConfig:
    """Take the SLURM settings from a parsed command line; missing or None values keep their defaults."""
    names = [field.name for field in dataclasses.fields(SlurmConfig)]
    return SlurmConfig(**{name: value for name in names if (value := getattr(args, name, None)) is not None})

"""The command line: train configurations here, one after the other, or submit them to SLURM as one job array."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from spidr.config import Config, SlurmConfig, read_config
from spidr.tools.errors import InputError
from spidr.tools.lazy import needs_extra

DESCRIPTION = """\
Train SpidR or DinoSR. With -A, -N and -G every configuration becomes a SLURM job; without SLURM options they are
trained here, one after the other, on all GPUs of this machine, else on its CPU.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 if everything was trained, or submitted.
    """
    parser = _build_parser()
    args = parser.parse_args(argv)
    given = {
        field.name: value
        for field in dataclasses.fields(SlurmConfig)
        if (value := getattr(args, field.name)) is not None
    }
    on_slurm = given.keys() >= {"account", "nodes", "gpus_per_node"}
    if not on_slurm and (given or args.dump is not None):
        parser.error("SLURM needs -A, -N and -G together; without SLURM options, training runs here")
    try:
        configs = {path: read_config(path) for path in args.configs}
        _check_folders(configs)
        if on_slurm:
            return _on_slurm(list(configs.values()), given, args.dump, dry_run=args.dry_run)
        return _here(configs, dry_run=args.dry_run)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on from the last checkpoint\n")
        return 130


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m spidr", description=DESCRIPTION)
    parser.add_argument("configs", nargs="+", help="configuration files, TOML or JSON")
    slurm = parser.add_argument_group(
        "SLURM options", "Defaults are those of the cluster that $SPIDR_CLUSTER names, else of SLURM, where it says so."
    )
    preset = "(default: the cluster's)"
    slurm.add_argument("-A", "--account", help="account to charge (default: none, training runs here)")
    slurm.add_argument("-N", "--nodes", type=int, metavar="N", help="nodes of each job (default: none)")
    slurm.add_argument(
        "-G", "--gpus-per-node", type=int, metavar="N", help="GPUs of each node, one task for each (default: none)"
    )
    slurm.add_argument("-c", "--cpus-per-task", type=int, metavar="N", help=f"CPUs of each task {preset}")
    slurm.add_argument("--mem-per-gpu", metavar="MEMORY", help=f"memory for each GPU, such as 80g {preset}")
    slurm.add_argument(
        "-t", "--time", type=int, metavar="MINUTES", help=f"time limit; the job goes on in another one {preset}"
    )
    slurm.add_argument("-C", "--constraint", help=f"features that the nodes must have {preset}")
    slurm.add_argument("-p", "--partition", help=f"partition to use {preset}")
    slurm.add_argument("-q", "--qos", help=f"quality of service {preset}")
    slurm.add_argument("--dump", type=Path, help="folder for the job folder (default: $SPIDR_SUBMITIT_FOLDER)")
    parser.add_argument(
        "--dry-run", action="store_true", help="check configurations and manifests, show what would be done, and end"
    )
    return parser


def _check_folders(configs: dict[str, Config]) -> None:
    """Two runs in one folder would overwrite each other."""
    users: dict[Path, str] = {}
    for path, config in configs.items():
        if (other := users.setdefault(config.run.dir.resolve(), path)) != path:
            raise InputError(f"{other} and {path} both train in {config.run.dir}; change run.wandb_name of one of them")


def _check_manifests(configs: Sequence[Config]) -> None:
    """See that manifests can be read, and their recordings as far as a look at files and some headers tells."""
    with needs_extra("train"):
        from spidr.data.manifest import read_manifest
        from spidr.data.measure import check_recordings

    sets = {(path, data.on_error) for config in configs for data in (config.data, *config.validation.values())
            for path in data.manifests}  # fmt: skip
    for path, on_error in sorted(sets):
        manifest = read_manifest(path)
        if on_error == "raise":
            check_recordings(manifest, path)


# --------------------------------------------------------------------------------------------------------------------
# On SLURM


def _on_slurm(configs: Sequence[Config], options: dict[str, object], dump: Path | None, *, dry_run: bool) -> int:
    from spidr import slurm

    dump = dump or Path(os.environ.get("SPIDR_SUBMITIT_FOLDER", ""))
    if dump == Path():
        raise InputError("no folder for the job: give --dump or set SPIDR_SUBMITIT_FOLDER")
    settings = SlurmConfig(**slurm.cluster_preset() | options)
    name = configs[0].run.wandb_name
    copy_code = not slurm.is_installed()
    _check_manifests(configs)
    if dry_run:
        folder = next(f for f in slurm.job_folders(dump, name, datetime.now(UTC)) if not f.exists())
        submission = slurm.prepare(name, len(configs), folder, settings, copy_code=copy_code)
        sys.stdout.write(f"{shlex.join(submission.command)} <<'EOF'\n{submission.script}EOF\n")
        return 0
    with needs_extra("train"):
        from spidr.train import train

    jobs = [(train, (config,)) for config in configs]
    job_id, folder = slurm.submit(name, jobs, dump, settings, copy_code=copy_code)
    sys.stdout.write(f"Submitted job {job_id}: {folder}\n")
    return 0


# --------------------------------------------------------------------------------------------------------------------
# Here


def _here(configs: dict[str, Config], *, dry_run: bool) -> int:
    if dry_run:
        _check_manifests(list(configs.values()))
        for path, config in configs.items():
            sys.stdout.write(f"{path}: trains here, in {config.run.dir}\n")
        return 0
    with needs_extra("train"):
        from spidr.train import train

    for path, config in configs.items():
        gpus = _gpus_to_spread_over(config)
        if gpus > 1:
            _train_on_gpus(path, gpus)
        else:
            train(config)
    return 0


def _gpus_to_spread_over(config: Config) -> int:
    """How many processes to start: none if this is one of several already."""
    import torch

    from spidr.environment import ranks

    several = ranks()[2] > 1 or "RANK" in os.environ
    return 0 if several or config.run.device not in ("auto", "cuda") else torch.cuda.device_count()


def _train_on_gpus(path: str, count: int) -> None:
    """Train in one process per GPU, which end with this one.

    Raises:
        SystemExit: With the status of the process that failed first, or that of a signal, which all of them get.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(["--standalone", f"--nproc-per-node={count}", "-m", "spidr.train", path])
    except ChildFailedError as error:
        raise SystemExit(error.get_first_failure()[1].exitcode) from None
    except SignalException as stop:
        raise SystemExit(128 + stop.sigval) from None


if __name__ == "__main__":
    sys.exit(main())

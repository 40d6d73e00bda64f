"""The command line: the package's programs by name, and training, locally or on SLURM."""

import argparse
import logging
import os
import re
import runpy
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from spidr import __version__
from spidr.config import Config, SlurmConfig, read_config, schedule_remark
from spidr.tools.command import PROGRAMS, Parser, command, write_result
from spidr.tools.errors import InputError
from spidr.tools.lazy import needs_extra
from spidr.tools.threads import keep_memory, set_up_threads

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Train SpidR or DinoSR: with -N and -G as SLURM jobs, else here, one after the other, on all GPUs or the CPU. Started
again, a run resumes.
"""
EXAMPLE = """\
python -m spidr config.toml optimizer.lr=1e-3 run.wandb_name=faster
python -m spidr config.toml -N 2 -G 8 -t 1200 --dump jobs --dry-run"""


def spidr() -> None:
    """Run ``spidr NAME``, short for ``python -m MODULE``."""
    set_up_threads()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in PROGRAMS and name != "train":
        del sys.argv[1]
        runpy.run_module(PROGRAMS[name], run_name="__main__", alter_sys=False)
    try:
        sys.exit(main())
    finally:
        for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):  # none may change the status while Python ends
            if hasattr(signal, name):  # Windows has only some of them
                signal.signal(getattr(signal, name), signal.SIG_IGN)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train, or submit to SLURM.

    Returns:
        The exit status: 0 if everything was trained, or submitted, else that of the first run that failed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not argv:
        parser.print_help()
        return 2
    if "--version" in argv:
        write_result(f"spidr {__version__}\n")
        return 0
    args = parser.parse_intermixed_args(argv[1:] if argv[:1] == ["train"] else argv)
    overrides = [word for word in args.configs if _OVERRIDE.match(word)]
    paths = [word for word in args.configs if word not in overrides]
    if not paths:
        parser.error("no configuration is given, such as config.toml")
    options = {f.name: value for f in fields(SlurmConfig) if (value := getattr(args, f.name)) is not None}
    on_slurm = options.keys() >= {"nodes", "gpus_per_node"}
    if not on_slurm and (options or args.dump is not None):
        parser.error("SLURM needs -N and -G together; without SLURM options, training runs here")
    with _once_per_machine():
        configs = {path: read_config(path, overrides) for path in dict.fromkeys(paths)}
        _check_folders(configs)
    if args.dry_run or on_slurm:
        with needs_extra("train"):
            from spidr.inputs import check_inputs
        check_inputs(configs.values())
        for path, config in configs.items():
            if (remark := schedule_remark(config.optimizer)) is not None:
                logger.warning("%s: %s", path, remark)
    if on_slurm:
        return _on_slurm(list(configs.values()), options, args.dump, dry_run=args.dry_run)
    if args.dry_run:
        write_result("".join(f"{path}: trains here, in {config.run.dir}\n" for path, config in configs.items()))
        return 0
    return _here(configs, overrides)


_OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)+\s*=")


def _parser() -> argparse.ArgumentParser:
    others = f"other programs (spidr NAME --help): {', '.join(sorted(PROGRAMS.keys() - {'train'}))}"
    parser = Parser("python -m spidr", description=DESCRIPTION, epilog=others, example=EXAMPLE)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="TOML or JSON; SECTION.KEY=VALUE changes all")
    parser.add_argument("--dry-run", action="store_true", help="check all inputs, show what would be done, and end")
    parser.add_argument("--version", action="store_true", help="show the version, and end")
    about = "A preset is the table of clusters.toml that $SPIDR_CLUSTER names."
    slurm, preset = parser.add_argument_group("SLURM options", about), "(default: preset)"
    slurm.add_argument("-A", "--account", help="account to charge (default: the user's)")
    slurm.add_argument("-N", "--nodes", type=int, metavar="N", help="nodes (default: none, trains here)")
    slurm.add_argument("-G", "--gpus-per-node", type=int, metavar="N", help="GPUs and tasks per node (default: none)")
    slurm.add_argument("-c", "--cpus-per-task", type=int, metavar="N", help=f"CPUs per task {preset}")
    slurm.add_argument("--mem-per-gpu", metavar="MEMORY", help=f"memory per GPU, such as 80g {preset}")
    slurm.add_argument("-t", "--time", type=int, metavar="MINUTES", help=f"time limit, then it resumes {preset}")
    slurm.add_argument("-C", "--constraint", help=f"features of the nodes {preset}")
    slurm.add_argument("-p", "--partition", help=f"partition {preset}")
    slurm.add_argument("-q", "--qos", help=f"quality of service {preset}")
    slurm.add_argument("--dump", type=Path, help="for job folders (default: $SPIDR_SUBMITIT_FOLDER)")
    return parser


@contextmanager
def _once_per_machine() -> Iterator[None]:
    """Let only one process per machine report a mistake that all of them find."""
    try:
        yield
    except InputError:
        if "RANK" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(2)
        raise


def _check_folders(configs: dict[str, Config]) -> None:
    """Check that no two runs share a folder, where they would overwrite each other."""
    users: dict[Path, str] = {}
    for path, config in configs.items():
        if (other := users.setdefault(config.run.dir.resolve(), path)) != path:
            raise InputError(f"{other} and {path} both train in {config.run.dir}; change run.wandb_name of one of them")


def _on_slurm(configs: Sequence[Config], options: dict[str, Any], dump: Path | None, *, dry_run: bool) -> int:
    from spidr.slurm.code import is_installed
    from spidr.slurm.launch import submit
    from spidr.slurm.presets import default_train_job_config
    from spidr.slurm.submission import job_folders, prepare

    dump = dump or Path(os.environ.get("SPIDR_SUBMITIT_FOLDER", ""))
    if dump == Path():
        raise InputError("no folder for the job: give --dump or set SPIDR_SUBMITIT_FOLDER", guide="slurm.md")
    settings = SlurmConfig(**default_train_job_config(os.environ.get("SPIDR_CLUSTER")) | options)
    name, copy_code = configs[0].run.wandb_name, not is_installed()
    if dry_run:
        folder = next(f for f in job_folders(dump, name) if not f.exists())
        submission = prepare(name, len(configs), folder, settings, copy_code=copy_code)
        write_result(f"{shlex.join(submission.command)} <<'EOF'\n{submission.script}EOF\n")
        return 0
    with needs_extra("train"):
        from spidr.train import train

    job_id, folder = submit(name, [(train, (config,)) for config in configs], dump, settings, copy_code=copy_code)
    write_result(f"Submitted job {job_id}: {folder}\n")
    return 0


def _here(configs: dict[str, Config], overrides: list[str]) -> int:
    with _once_per_machine(), needs_extra("train"):
        import torch

        from spidr.environment import ranks
        from spidr.train import train

    keep_memory()
    status = 0
    for path, config in configs.items():
        is_one_of_several = ranks()[2] > 1 or "RANK" in os.environ
        gpus = torch.cuda.device_count() if config.run.device in ("auto", "cuda") and not is_one_of_several else 0
        ended = _train_on_gpus([path, *overrides], gpus) if gpus > 1 else command(train)(config)
        status = status or ended
    return status


def _train_on_gpus(arguments: list[str], count: int) -> int:
    """Train in one process per GPU, and return the status of the first that failed. Signals go to all of them."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # It kills processes so many seconds after a signal, by default 30, though a checkpoint may take longer.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    try:
        torchrun(["--standalone", f"--nproc-per-node={count}", "-m", "spidr.train", *arguments])
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException as stop:
        raise SystemExit(128 + stop.sigval) from None
    return 0


if __name__ == "__main__":
    spidr()

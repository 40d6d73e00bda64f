"""Processes and devices: who this process is, what it computes on, and how it hears that it must stop."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from spidr.config import RunConfig
from spidr.tools.errors import InputError
from spidr.tools.lazy import names_from
from spidr.tools.peers import Peers, connect

logger = logging.getLogger(__name__)

__getattr__ = names_from(__name__, "spidr.compat.training")  # what published packages also have here

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PREEMPTED_EXIT_CODE = 75
MEETING_TIMEOUT = timedelta(minutes=10)
"""How long processes wait for each other at the start: a cluster may start them one after the other."""

COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""Long: slow data or a slow disk of one process is no reason to end the run, and dead ones are found in other ways."""


MAX_PROCESSES = 1_000_000
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM_VARIABLES = (
    "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_JOB_NODELIST",
    "SLURM_CPUS_PER_TASK",
)  # fmt: skip
REMEDY = "start the processes with torchrun or srun, or unset these variables to run one alone"


class Preempted(SystemExit):
    """A signal asked the run to stop; its state is saved and the same command goes on from there. Exit status 75."""

    def __init__(self, signum: int) -> None:
        super().__init__(PREEMPTED_EXIT_CODE)
        self.signum = signum


class StopFlag:
    """Remembers the first stop signal. The training loop looks at it at step boundaries."""

    def __init__(self) -> None:
        self.signum = 0

    def set(self, signum: int, frame: FrameType | None = None) -> None:  # noqa: ARG002
        """Handle a signal: only remember it, so that nothing is interrupted half-way."""
        self.signum = self.signum or signum

    @contextmanager
    def listening(self) -> Iterator[StopFlag]:
        """Handle the stop signals inside the block."""
        previous = {signum: signal.signal(signum, self.set) for signum in STOP_SIGNALS}
        try:
            yield self
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


@dataclass(frozen=True)
class Environment:
    """This process among all of the run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that logs, saves and talks to others."""
        return self.rank == 0

    def all_reduce(self, x: Tensor) -> None:
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(x)

    def broadcast(self, x: Tensor) -> None:
        """Take the main process's values, in place."""
        if self.world_size > 1:
            dist.broadcast(x, src=0)

    def broadcast_object(self, value: Any) -> Any:
        """What the main process holds as ``value``."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """The ``value`` of every process, in order of rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def ranks() -> tuple[int, int, int]:
    """(rank, local rank, number of processes) from torchrun's variables, else from a SLURM job step's, else alone.

    Raises:
        InputError: Some of the variables are missing, no numbers, or contradict each other.
    """
    environ = os.environ
    if "SLURM_CPUS_PER_TASK" in environ:
        _number("SLURM_CPUS_PER_TASK", 1, MAX_PROCESSES)
    if "RANK" in environ or "WORLD_SIZE" in environ:
        world_size = _number("WORLD_SIZE", 1, MAX_PROCESSES)
        rank = _number("RANK", 0, world_size - 1, "WORLD_SIZE")
        local, bound = world_size, "WORLD_SIZE"
        if "LOCAL_WORLD_SIZE" in environ:
            local, bound = _number("LOCAL_WORLD_SIZE", 1, world_size, bound), "LOCAL_WORLD_SIZE"
        local_rank = _number("LOCAL_RANK", 0, local - 1, bound) if "LOCAL_RANK" in environ else 0
        if world_size > 1:
            _needed("MASTER_ADDR")
            _number("MASTER_PORT", 1, 65_535)
        return rank, local_rank, world_size
    if "LOCAL_RANK" in environ:
        _needed("RANK")
    if environ.get("SLURM_STEP_ID", "").isdigit():  # in an allocation without a step, this process is alone
        world_size = _number("SLURM_NTASKS", 1, MAX_PROCESSES)
        rank = _number("SLURM_PROCID", 0, world_size - 1, "SLURM_NTASKS")
        return rank, _number("SLURM_LOCALID", 0, world_size - 1, "SLURM_NTASKS"), world_size
    return 0, 0, 1


def use_slurm() -> None:
    """In a SLURM job step without torchrun's variables, set those that say where all processes meet."""
    environ = os.environ
    if "RANK" in environ:
        return
    if "OMP_NUM_THREADS" not in environ:  # as torchrun does: tasks must not compete for the same cores
        torch.set_num_threads(int(environ.get("SLURM_CPUS_PER_TASK", "1")))
    if "MASTER_ADDR" not in environ:
        environ["MASTER_ADDR"] = _first_host(_needed("SLURM_JOB_NODELIST"))
    if "MASTER_PORT" not in environ:
        # The same on every node, and rarely the same for two jobs that share one.
        environ["MASTER_PORT"] = str(20_000 + _number("SLURM_JOB_ID", 0, 2**63 - 1) % 20_000)
    _needed("MASTER_ADDR")
    _number("MASTER_PORT", 1, 65_535)


def _needed(name: str) -> str:
    """What a variable says."""
    value = os.environ.get(name, "")
    if not value.strip():
        what = "empty" if name in os.environ else f"not set, but {_others(name)}"
        raise InputError(f"the environment variable {name} is {what}: {REMEDY}")
    return value


def _number(name: str, low: int, high: int, bound: str | None = None) -> int:
    """What a variable says, a number between ``low`` and ``high``, which is the one that ``bound`` leaves."""
    value = _needed(name)
    if not re.fullmatch(r"[0-9]{1,20}", value):
        raise InputError(f"the environment variable {name} is {value[:80]!r}, not a number: {REMEDY}")
    if not low <= int(value) <= high:
        text = f"with {bound} = {os.environ[bound]} it must be" if bound else "it must be"
        raise InputError(f"the environment variable {name} is {value}, but {text} {low} to {high}: {REMEDY}")
    return int(value)


def _others(name: str) -> str:
    """Which variables of the same launcher are set."""
    family = SLURM_VARIABLES if name in SLURM_VARIABLES else TORCHRUN_VARIABLES
    there = [other for other in family if other in os.environ and other != name]
    return f"{', '.join(there)} {'are' if len(there) > 1 else 'is'}"


def _first_host(nodelist: str) -> str:
    """Name of the first host of a SLURM node list such as ``node[01-04,07]``."""
    try:
        shown = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True)
        return shown.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        reason = (getattr(error, "stderr", None) or getattr(error, "strerror", None) or "no host").strip()
        raise InputError(
            f"SLURM_JOB_NODELIST = {nodelist[:80]!r}: scontrol does not tell the first host ({reason}): set MASTER_ADDR"
        ) from None


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device to compute on.

    Args:
        name: "auto" (CUDA, else MPS, else the CPU), "cuda", "mps" or "cpu".
        local_rank: Which GPU of this machine, modulo their number.

    Raises:
        InputError: If there is no such device here.
    """
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise InputError('run.device is "cuda", but no CUDA device is available here: use "auto" or "cpu"')
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if name == "mps" or (name == "auto" and torch.backends.mps.is_available()):
        if not torch.backends.mps.is_available():
            raise InputError('run.device is "mps", but MPS is not available here: use "auto" or "cpu"')
        return torch.device("mps")
    return torch.device("cpu")


def _connect(rank: int) -> Any:
    """The store at which all processes of the run meet."""
    try:
        return connect(rank, MEETING_TIMEOUT, serve=True)
    except RuntimeError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        text = f"\nerror: rank {rank}: the place where all processes of the run meet, {place}, "
        text += "cannot be opened" if rank == 0 else "does not answer: rank 0 has not started or cannot be reached"
        raise SystemExit(f"{text} ({error})") from error


def _join(peers: Peers, store: Any, device: torch.device) -> None:
    """Wait until all processes have come, and set up what they compute together with."""
    peers.meet(MEETING_TIMEOUT)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=peers.rank,
        world_size=peers.world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )


@contextmanager
def environment(run: RunConfig) -> Iterator[Environment]:
    """Join the other processes of the run, if any, and choose the device; leave them at the end of the block.

    If something goes wrong, every process ends soon, and one of them says what it was: an error that several have comes
    out of the block on one of them only, and a process that has died is named by one of the others. The rest exits with
    the same status without a word.
    """
    rank, local_rank, world_size = ranks()
    if world_size > 1:
        use_slurm()
    device = choose_device(run.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(run.use_deterministic)
    if run.use_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    if world_size == 1:
        yield Environment(rank, local_rank, world_size, device)
        return
    store = _connect(rank)
    with closing(Peers(rank, world_size)) as peers:
        try:
            _join(peers, store, device)
            logger.info("rank %d of %d on %s (%s)", rank, world_size, socket.gethostname(), device)
            yield Environment(rank, local_rank, world_size, device)
        except Exception as error:
            cause = peers.explain(error, status=2 if isinstance(error, InputError) else 1)
            if cause.told_by != rank:
                raise SystemExit(cause.status) from error
            if cause.about != rank:
                raise SystemExit(f"\nerror: {cause.text}") from error
            raise
        except Preempted:
            peers.leave()
            raise
        else:
            peers.leave()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed what a training step draws (dropout, layer drop) from its arguments, so that no state has to be saved."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))

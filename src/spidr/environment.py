"""Processes and devices: this process's rank and device, and how it learns that it must stop."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Self, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from spidr.models.kernels import exact_products
from spidr.tools.errors import InputError
from spidr.tools.lazy import names_from
from spidr.tools.peers import Cause, Peers

logger = logging.getLogger(__name__)

T = TypeVar("T")

__getattr__ = names_from(__name__, "spidr.compat.training")  # what published packages also have here

PREEMPTED_EXIT_CODE = 75

MEETING_TIMEOUT = timedelta(minutes=10)
"""How long processes wait for each other at the start: a cluster may start them one by one."""

MAX_PROCESSES = 1_000_000

LAUNCHER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),  # torchrun's
    *("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_JOB_NODELIST"),
    "SLURM_CPUS_PER_TASK",
)
REMEDY = "start the processes with torchrun or srun, or unset these variables to run one alone"


class Preempted(SystemExit):
    """A signal asked the run to stop; the same command resumes it. Exit status 75, or 130 after Ctrl-C."""

    def __init__(self, signum: int, *, agreed: bool = False) -> None:
        super().__init__(130 if signum == signal.SIGINT else PREEMPTED_EXIT_CODE)
        self.signum = signum
        self.agreed = agreed  # whether all processes stop here

    def __str__(self) -> str:
        name = signal.Signals(self.signum).name if self.signum else "a signal to another process"
        return f"stopped by {name}; the same command resumes from the last checkpoint"


class StopFlag:
    """Remembers the first stop signal (0 if none) until the training loop checks for it, between two steps.

    While nothing checks, ``immediate`` is set: the first signal then ends the process at once.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.immediate = False
        self._interrupted = False

    def set(self, signum: int, frame: FrameType | None = None) -> None:  # noqa: ARG002
        """Handle a signal: only remember it, so that nothing is interrupted, unless :attr:`immediate` is set.

        Raises:
            KeyboardInterrupt: At the second Ctrl-C.
            Preempted: If :attr:`immediate` is set.
        """
        if signum == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.signum = self.signum or signum
        if self.immediate:
            self.immediate = False  # SLURM sends several: ending is not to be interrupted
            raise Preempted(signum)
        if signum == signal.SIGINT:
            sys.stderr.write("\nstopping after this step, to save; press Ctrl-C again to stop at once\n")

    @contextmanager
    def listening(self) -> Iterator[Self]:
        """Handle the stop signals inside the block, in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            logger.warning("training runs in a thread: signals, Ctrl-C too, do not save and stop it")
            yield self
            return
        with ExitStack() as restore:
            for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGBREAK"):
                number = getattr(signal, name, None)  # Windows has only some of them
                if number and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):  # nohup
                    restore.callback(signal.signal, number, signal.signal(number, self.set))
            yield self


@dataclass(frozen=True)
class Environment:
    """This process's place in the run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that logs, saves and reports."""
        return self.rank == 0

    @classmethod
    def alone(cls, device: str = "auto") -> Self:
        """A single process on a device, see :func:`choose_device`."""
        return cls(0, 0, 1, choose_device(device))

    def all_reduce(self, x: Tensor) -> None:
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(x)

    def broadcast(self, x: Tensor) -> None:
        """Take the main process's values, in place."""
        if self.world_size > 1:
            dist.broadcast(x, src=0)

    def broadcast_object(self, value: Any) -> Any:
        """The main process's ``value``."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_objects(self, value: T, stop: StopFlag | None = None) -> list[T]:
        """The ``value`` of every process, in order of rank.

        Raises:
            Preempted: On all processes, if a signal has set ``stop`` on any.
        """
        signum = 0 if stop is None else stop.signum
        gathered = [(signum, value)] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(gathered, (signum, value))
        signums, values = zip(*gathered, strict=True)
        if any(signums):
            raise Preempted(max(signums), agreed=True)
        return list(values)


def ranks() -> tuple[int, int, int]:
    """(rank, local rank, number of processes) from torchrun's variables, else from a SLURM job step's, else alone.

    Raises:
        InputError: Some of the variables are missing, are not numbers, or contradict each other.
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
        return rank, _number("LOCAL_RANK", 0, local - 1, bound) if "LOCAL_RANK" in environ else 0, world_size
    if "LOCAL_RANK" in environ:
        _needed("RANK")
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if "SLURM_STEP_ID" not in environ and environ.get(name, "1") != "1":
            raise InputError(f"{name} = {environ[name][:80]}: mpirun started several processes; use torchrun or srun")
    if environ.get("SLURM_STEP_ID", "").isdigit():  # in an allocation without a step, this process is alone
        world_size = _number("SLURM_NTASKS", 1, MAX_PROCESSES)
        rank = _number("SLURM_PROCID", 0, world_size - 1, "SLURM_NTASKS")
        return rank, _number("SLURM_LOCALID", 0, world_size - 1, "SLURM_NTASKS"), world_size
    return 0, 0, 1


def find_meeting_place() -> None:
    """Check the variables of the address where processes meet; in a SLURM job step without torchrun, set them."""
    environ = os.environ
    if "RANK" not in environ:
        if "OMP_NUM_THREADS" not in environ:  # as torchrun does: tasks must not compete for the same cores
            torch.set_num_threads(int(environ.get("SLURM_CPUS_PER_TASK", "1")))
        if "MASTER_ADDR" not in environ:
            environ["MASTER_ADDR"] = _first_host(_needed("SLURM_JOB_NODELIST"))
        if "MASTER_PORT" not in environ:
            # The same on every node, rarely for two jobs that share a node, and below the ports (32,768 and up)
            # that Linux gives to outgoing connections.
            environ["MASTER_PORT"] = str(20_000 + _number("SLURM_JOB_ID", 0, 2**63 - 1) % 12_000)
    _needed("MASTER_ADDR")
    _number("MASTER_PORT", 1, 65_535)


def _needed(name: str) -> str:
    """The value of an environment variable that must be set."""
    value = os.environ.get(name, "")
    if not value.strip():
        is_slurm = name.startswith("SLURM_")
        others = [n for n in LAUNCHER_VARIABLES if n in os.environ and n.startswith("SLURM_") == is_slurm]
        what = f"not set, but {', '.join(others)} {'are' if len(others) > 1 else 'is'}"
        raise InputError(f"the environment variable {name} is {'empty' if name in os.environ else what}: {REMEDY}")
    return value


def _number(name: str, low: int, high: int, bound: str | None = None) -> int:
    """The value of a variable as a number from ``low`` to ``high``; ``bound`` names the variable behind ``high``."""
    value = _needed(name)
    if not re.fullmatch(r"[0-9]{1,20}", value):
        raise InputError(f"the environment variable {name} is {value[:80]!r}, not a number: {REMEDY}")
    if not low <= int(value) <= high:
        given = f"with {bound} = {os.environ[bound]} " if bound else ""
        raise InputError(f"the environment variable {name} is {value}, but {given}it must be {low} to {high}: {REMEDY}")
    return int(value)


def _first_host(nodelist: str) -> str:
    """Name of the first host of a SLURM node list such as ``node[01-04,07]``."""
    try:
        command = ["scontrol", "show", "hostnames", nodelist]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return shown.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        reason = (getattr(error, "stderr", None) or getattr(error, "strerror", None) or "no host").strip()
        raise InputError(
            f"SLURM_JOB_NODELIST = {nodelist[:80]!r}: scontrol does not tell the first host ({reason}): set MASTER_ADDR"
        ) from None


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for a name: "auto" (CUDA, else MPS, else the CPU), "cuda", "mps" or "cpu".

    Of several GPUs, it is the one of the local rank, modulo their number. Raises InputError if it does not exist.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if name in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    if name not in ("auto", "cpu"):
        what = "no CUDA device is" if name == "cuda" else "MPS is not"
        raise InputError(f'run.device is "{name}", but {what} available here: use "auto" or "cpu"')
    return torch.device("cpu")


def _connect(rank: int) -> Any:
    """Connect to the store through which all processes of the run meet; rank 0 serves it if no launcher does."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=serves, timeout=MEETING_TIMEOUT, wait_for_workers=False
        )
    except RuntimeError as error:
        what = "cannot be opened" if rank == 0 else "does not answer: rank 0 has not started or cannot be reached"
        text = f"the place where all processes of the run meet, {host}:{port}, {what}"
        raise SystemExit(f"\nerror: rank {rank}: {text} ({error})") from error


def _join(peers: Peers, store: Any, device: torch.device) -> None:
    """Wait for all processes, then set up the process group."""
    peers.meet(MEETING_TIMEOUT)
    backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    # Slow data or a slow disk must not end the run, and dead processes are found by other means.
    long = timedelta(hours=1)
    dist.init_process_group(
        backend, store=store, rank=peers.rank, world_size=peers.world_size, timeout=long, device_id=gpu
    )


class RunEndedError(SystemExit):
    """This process ends because of another one of the run, for ``cause``."""

    def __init__(self, cause: Cause, rank: int) -> None:
        super().__init__(f"\nerror: {cause.text}" if cause.told_by == rank else cause.status)
        self.cause = cause


@contextmanager
def environment(device_name: str, *, use_deterministic: bool = False) -> Iterator[Environment]:
    """Join the other processes of the run, if any, and choose the device; leave them at the end of the block.

    Inside the block, torch's global settings have their defaults.

    If something goes wrong, every process ends soon, and one of them says why: an error on several leaves the block on
    one of them only, and a dead process is named by one of the others. The rest exit silently with the same status.
    """
    rank, local_rank, world_size = ranks()
    if world_size > 1:
        find_meeting_place()
    device = choose_device(device_name, local_rank)
    with _settings(device, use_deterministic=use_deterministic):
        if world_size == 1:
            yield Environment(rank, local_rank, world_size, device)
            return
        store = _connect(rank)
        with closing(Peers(store, rank, world_size)) as peers:
            try:
                _join(peers, store, device)
                logger.info("rank %d of %d on %s (%s)", rank, world_size, socket.gethostname(), device)
                yield Environment(rank, local_rank, world_size, device)
            except Preempted as stop:
                if stop.agreed:
                    peers.leave()
                elif (cause := peers.explain(stop, status=PREEMPTED_EXIT_CODE)).status != PREEMPTED_EXIT_CODE:
                    raise RunEndedError(cause, rank) from stop  # a launcher stops all when one has failed
                raise
            except Exception as error:
                cause = peers.explain(error, status=2 if isinstance(error, InputError) else 1)
                if cause.told_by == cause.about == rank:
                    raise
                raise RunEndedError(cause, rank) from error
            else:
                peers.leave()
            finally:
                _leave_group()


def _leave_group() -> None:
    """Leave the process group; after a failure, without waiting for the others, which may be dead."""
    if not dist.is_initialized():
        return
    abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
    if sys.exc_info()[1] is not None and dist.get_backend() == "nccl" and abort is not None:
        abort()
    else:
        dist.destroy_process_group()


@contextmanager
def _settings(device: torch.device, *, use_deterministic: bool) -> Iterator[None]:
    """Set torch's global settings for a run inside the block; restore them and the random generators afterwards."""
    gpus = [device] if device.type == "cuda" else []
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with exact_products(device), torch.random.fork_rng(gpus), ExitStack() as restore:
        restore.callback(torch.set_num_threads, torch.get_num_threads())
        restore.callback(
            torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled(), warn_only=warn_only
        )
        if (default_device := torch.empty(0).device).type != "cpu":
            restore.callback(torch.set_default_device, default_device)
            torch.set_default_device(None)
        restore.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if use_deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.use_deterministic_algorithms(use_deterministic)
        if gpus:
            torch.cuda.set_device(device)
        yield


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the random draws of a training step (dropout, layer drop), so that no generator state has to be saved."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))

"""Settings of commands: as many threads as processors, no spinning, small caches, and freed memory is kept."""

import ctypes
import os
import sys
from pathlib import Path

PATIENCE = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""How long a thread spins before it sleeps, for GNU's OpenMP (in rounds) and for LLVM's and Intel's (in ms).

By default it spins for up to 200 ms, and on a busy machine a step takes several times as long.
"""

CHOICES = ("OMP_WAIT_POLICY", "KMP_LIBRARY", *PATIENCE)  # variables that, if set by the user, take precedence

CAPACITIES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}
"""Compiled operations that oneDNN and PyTorch's layer above it each cache, instead of 1,024.

Every batch length needs its own. A step needs up to two hundred; older ones cost memory and are not used again.
"""

MALLOC_CHOICES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""Variables that, if set by the user, control glibc's allocator."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def set_up_threads() -> None:
    """Set what OpenMP and oneDNN read when torch is loaded, unless the environment has it already.

    Called at the start of a command, never by an import alone. A container with a CPU quota gets as many threads as its
    quota allows.
    """
    if not any(name in os.environ for name in CHOICES):
        os.environ.update(PATIENCE)
    for name, value in CAPACITIES.items():
        os.environ.setdefault(name, value)
    allowed = quota()
    if "OMP_NUM_THREADS" not in os.environ and allowed is not None and allowed < (os.cpu_count() or 1):
        os.environ["OMP_NUM_THREADS"] = str(allowed)


def runs_a_command() -> bool:
    """Whether this process is ``python -m spidr…`` and is still importing its modules."""
    given = sys.orig_argv
    module = given[given.index("-m") + 1 :][:1] if "-m" in given else []
    return sys.argv[:1] == ["-m"] and bool(module) and module[0].split(".")[0] == "spidr"


def quota(cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The CPU quota of the control group (version 2), rounded up; None: no limit."""
    try:
        quota, period = cgroup.joinpath("cpu.max").read_text("utf-8").split()
        return max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):  # another system, or "max"
        return None


def keep_memory() -> None:
    """Make glibc keep freed memory, unless the environment says otherwise.

    Each training step allocates what the previous one freed. By default, large blocks go back to the kernel, which then
    clears every page again: up to a tenth of a step on a CPU.
    """
    if sys.platform != "linux" or any(name in os.environ for name in MALLOC_CHOICES):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)

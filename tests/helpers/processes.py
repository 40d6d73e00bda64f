"""Training in real processes that a test can kill: ranks forked from a server that has already imported everything."""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from helpers.ports import free_port
from helpers.tiny_run import MEASURED
from spidr.config import read_config
from spidr.tools.command import command
from spidr.tools.metrics import read_metrics

torch.set_num_threads(1)  # more threads only slow down such small models
CONTEXT = multiprocessing.get_context("forkserver")
# torch imports the last two lazily, which takes seconds.
CONTEXT.set_forkserver_preload(["spidr.train", "helpers.processes", "torch._dynamo", "torch.distributed.fsdp"])


PLACES = {
    "meeting": ("spidr.environment", "_join"),
    "step": ("spidr.train", "seed_step"),
    "validation": ("spidr.validate", "_measure"),
    "checkpoint": ("spidr.tools.files", "_rename"),
}
"""Functions that a rank calls when it waits for others, begins a step or a validation, or renames a new file."""


@dataclass(frozen=True)
class Fault:
    """A signal that a rank sends when it reaches one of ``PLACES`` for the ``count``-th time.

    ``rank`` None means every rank. With ``worker``, the signal goes to its data worker, otherwise to itself.
    """

    place: str
    count: int = 1
    signum: int = signal.SIGKILL
    rank: int | None = 0
    worker: bool = False

    def arm(self) -> None:
        """Install the fault in this process."""
        module_name, name = PLACES[self.place]
        module = importlib.import_module(module_name)
        original, calls = getattr(module, name), itertools.count(1)

        def struck(*args: Any, **kwargs: Any) -> Any:
            counts = self.place != "checkpoint" or args[1].name.startswith("step_")
            if counts and next(calls) == self.count:
                os.kill(multiprocessing.active_children()[0].pid if self.worker else os.getpid(), self.signum)
            return original(*args, **kwargs)

        setattr(module, name, struck)


def _rank(config: Path, rank: int, world_size: int, port: int, log: Path, fault: Fault | None, hooks: Any) -> None:
    """One process of a run."""
    from spidr.tools import peers
    from spidr.train import train

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # the default where data workers start
    sys.stderr = sys.stdout = log.open("a", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    peers.BEAT, peers.SILENCE, peers.GRACE = 0.2, 6, 5  # notice dead processes soon
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if fault is not None and fault.rank in (None, rank):
        fault.arm()
    sys.exit(command(train)(read_config(config), hooks() if hooks is not None else None))


class Ranks:
    """The processes of a run."""

    def __init__(
        self,
        config: Path,
        world_size: int = 1,
        fault: Fault | None = None,
        hooks: Callable[[], Any] | None = None,
        missing: int = 0,
    ) -> None:
        """Start all processes but the last ``missing``."""
        self.log = config.with_suffix(".log")
        self.log.write_text("")
        port = free_port()
        self.processes = [
            CONTEXT.Process(target=_rank, args=(config, rank, world_size, port, self.log, fault, hooks))
            for rank in range(world_size - missing)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 250) -> list[int | None]:
        """Exit status of each rank; raises if one does not end in time."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        alive = [process for process in self.processes if process.is_alive()]
        for process in alive:
            process.kill()
        assert not alive, f"{len(alive)} of {len(self.processes)} processes hang:\n{self.log.read_text()}"
        return [process.exitcode for process in self.processes]


def complete(config: Path, world_size: int = 1, hooks: Callable[[], Any] | None = None, timeout: float = 250) -> Path:
    """Run to the end. Returns the run's folder."""
    ranks = Ranks(config, world_size, hooks=hooks)
    assert ranks.wait(timeout) == [0] * world_size, ranks.log.read_text()
    return read_config(config).run.dir


def outcome(run_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The final checkpoint and the metrics of a finished run, without times and rates."""
    checkpoint = torch.load(run_dir / "final.pt", weights_only=True)
    lines = read_metrics(run_dir / "metrics.jsonl")
    return checkpoint, [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def assert_same_run(run_dir: Path, undisturbed: Path) -> None:
    """Check that two finished runs have the same bits in their checkpoints and the same metrics."""
    (checkpoint, lines), (expected, expected_lines) = outcome(run_dir), outcome(undisturbed)
    assert differences(checkpoint, expected) == []
    assert lines == expected_lines
    assert not list(run_dir.glob(".*.tmp"))


def differences(found: Any, expected: Any, name: str = "") -> list[str]:
    """Where two nested containers of tensors and numbers differ."""
    if isinstance(expected, torch.Tensor):
        return [] if torch.equal(found, expected) else [name]
    if isinstance(expected, dict):
        if found.keys() != expected.keys():
            return [f"{name}: {found.keys() ^ expected.keys()}"]
        return [where for key in expected for where in differences(found[key], expected[key], f"{name}.{key}")]
    if isinstance(expected, (list, tuple)):
        if len(found) != len(expected):
            return [f"{name}: {len(found)} instead of {len(expected)}"]
        pairs = enumerate(zip(found, expected, strict=True))
        return [where for i, (a, b) in pairs for where in differences(a, b, f"{name}[{i}]")]
    return [] if found == expected else [f"{name}: {found} instead of {expected}"]

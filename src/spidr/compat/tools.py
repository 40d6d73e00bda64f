"""Meters, profiler and logger of ``spidr.tools``."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from spidr.tools.profiler import StepProfiler

__all__ = ["AverageMeter", "AverageMeters", "init_logger", "profiler_context"]

FORMAT = "[spidr] %(asctime)s - %(levelname)s - %(name)s - %(message)s"
COLORS = {"DEBUG": 37, "INFO": 32, "WARNING": 33, "ERROR": 31, "CRITICAL": 35}


class AverageMeter:
    """Mean of the values since the last :meth:`pop`, computed on their device, so that nothing waits for it."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = device, dtype
        self.reset()

    def reset(self) -> None:
        """Forget the values."""
        self.sum = torch.zeros((), device=self.device, dtype=self.dtype)
        self.count = torch.zeros((), device=self.device, dtype=torch.int64)

    def update(self, val: Tensor | float, n: int = 1) -> None:
        """Count a value ``n`` times."""
        self.sum += val * n
        self.count += n

    def pop(self) -> float:
        """Return the mean (NaN without values) and forget the values."""
        mean = (self.sum / self.count).item()
        self.reset()
        return mean


class AverageMeters:
    """One :class:`AverageMeter` per name."""

    def __init__(self, names: Sequence[str], device: torch.device, *, dtype: torch.dtype = torch.float32) -> None:
        self.names = list(names)
        self.meters = {name: AverageMeter(device, dtype) for name in names}

    def __getitem__(self, name: str) -> AverageMeter:
        return self.meters[name]

    def reset(self) -> None:
        """Forget all values."""
        for meter in self.meters.values():
            meter.reset()

    def update(self, **values: Tensor | float) -> None:
        """Count a value of some of the names."""
        for name, value in values.items():
            self.meters[name].update(value)

    def pop(self) -> dict[str, float]:
        """Return the means of all names and forget the values."""
        return {name: meter.pop() for name, meter in self.meters.items()}


class _Profiler(StepProfiler):
    steps = 0

    def step(self) -> None:
        """End a step."""
        self.steps += 1
        self(self.steps)


@contextmanager
def profiler_context(
    path: str | Path | None, skip_first: int = 1000, warmup: int = 5, active: int = 2
) -> Iterator[_Profiler]:
    """Record ``active`` steps after the first ``skip_first + warmup`` to an HTML trace; call ``step()`` after each.

    Without a ``path``, nothing is recorded.
    """
    profiler = _Profiler(None if path is None else Path(path), first=skip_first + warmup, count=active)
    try:
        yield profiler
    finally:
        profiler.stop()


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"\x1b[{COLORS.get(record.levelname, 0)}m{super().format(record)}\x1b[0m"


def init_logger(file: str | Path | None = None, *, with_colors: bool = False) -> None:
    """Log everything through the root logger: to standard output, warnings to standard error, all to ``file`` too."""
    errors = logging.StreamHandler(sys.stderr)
    errors.setLevel(logging.WARNING)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout), errors]
    if file is not None:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter((_Formatter if with_colors else logging.Formatter)(FORMAT))
    logging.basicConfig(level=logging.DEBUG, handlers=handlers, force=True)

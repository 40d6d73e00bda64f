"""Show progress: a bar on a terminal, a line a minute in a log file."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

logger = logging.getLogger(__name__)

LINE_EVERY = 60.0
"""Seconds between two log lines."""

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} {unit}, {elapsed} passed, {remaining} left"


@contextmanager
def progress(
    description: str, total: float, unit: str, scale: float = 1.0, *, shown: bool = True
) -> Iterator[Callable[[float], None]]:
    """Show the progress of some work.

    Args:
        description: What is made, such as "Units".
        total: The amount of work; 0 shows nothing.
        unit: The unit to show, such as "h of audio".
        scale: Units per amount of work.
        shown: Whether to show anything.

    Yields:
        A function that takes the amount done since its last call.
    """
    if not shown or total <= 0:
        yield lambda _: None
    elif sys.stderr is not None and sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns
        with tqdm(total=total * scale, desc=description, unit=unit, bar_format=_BAR, ncols=columns, nrows=20) as bar:
            yield lambda done: bar.update(done * scale)
    else:
        yield _Lines(description, total * scale, unit, scale)


class _Lines:
    def __init__(self, description: str, total: float, unit: str, scale: float) -> None:
        self.description, self.total, self.unit, self.scale = description, total, unit, scale
        self.done = 0.0
        self.start = self.last = time.monotonic()

    def __call__(self, done: float) -> None:
        self.done += done * self.scale
        now = time.monotonic()
        if now - self.last >= LINE_EVERY and self.done:
            self.last = now
            left = (now - self.start) * (self.total - self.done) / self.done
            logger.info(
                "%s: %.0f%% of %.2f %s, %s left",
                self.description,
                100 * self.done / self.total,
                self.total,
                self.unit,
                tqdm.format_interval(max(0.0, left)),
            )

"""Log lines of a run: on standard error and in a file of the run folder, through the package's own logger.

Imports nothing else of the package.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

FORMAT = "%(asctime)s %(levelname)s [rank {rank}] %(message)s"


class _AboveProgressBar(logging.Handler):
    """Writes to standard error without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def run_log(folder: Path, rank: int) -> Iterator[None]:
    """Log what the package says inside the block: everything on rank 0, warnings elsewhere; all of it to a file.

    The root logger is not touched, and the package's logger is as before at the end.

    Args:
        folder: The run folder; the file is ``log_RANK.txt`` there.
        rank: This process.
    """
    package = logging.getLogger("spidr")
    handlers: list[logging.Handler] = [logging.FileHandler(folder / f"log_{rank}.txt"), _AboveProgressBar()]
    handlers[1].setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for handler in handlers:
        handler.setFormatter(logging.Formatter(FORMAT.format(rank=rank)))
        package.addHandler(handler)
    level, propagate = package.level, package.propagate
    package.setLevel(logging.INFO)
    package.propagate = False
    try:
        yield
    finally:
        package.setLevel(level)
        package.propagate = propagate
        for handler in handlers:
            package.removeHandler(handler)
            handler.close()

"""Logging of a run, to standard error and a file in the run folder, through the package's own logger."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path

from tqdm import tqdm

FILE_ONLY = {"file_only": True}  # the `extra` of a log line that is on standard error in another form

FORMAT = "%(asctime)s %(levelname)s {who}%(message)s"


class _AboveProgressBar(logging.Handler):
    """Writes to standard error without breaking a progress bar, except lines for the file only."""

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, "file_only"):
            tqdm.write(self.format(record), file=sys.stderr)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Stay silent: on a full disk every line would fail, each with a traceback on standard error."""

    def close(self) -> None:
        """Close the file, whether or not the last lines can be written."""
        with suppress(OSError):
            super().close()


@contextmanager
def run_log(rank: int, processes: int = 1) -> Iterator[Callable[[Path], None]]:
    """Log the package's messages to standard error inside the block: all on rank 0, only warnings elsewhere.

    With several processes, lines name their rank. The root logger is not touched, and the package's logger is restored
    at the end. Returns a function that opens a log file, which gets everything, including earlier lines.
    """
    package = logging.getLogger("spidr")
    who = f"[rank {rank}] " if processes > 1 else ""
    formatter = logging.Formatter(FORMAT.format(who=who), "%Y-%m-%d %H:%M:%S")
    stderr, buffer = _AboveProgressBar(), MemoryHandler(1_000_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    stderr.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    stderr.setFormatter(formatter)
    handlers: list[logging.Handler] = [stderr, buffer]

    def open_file(path: Path) -> None:
        file = _LogFile(path, encoding="utf-8")
        file.setFormatter(formatter)
        buffer.setTarget(file)
        buffer.flush()
        handlers.append(file)
        package.addHandler(file)
        package.removeHandler(buffer)

    level, propagate = package.level, package.propagate
    for handler in handlers:
        package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False
    try:
        yield open_file
    finally:
        package.setLevel(level)
        package.propagate = propagate
        for handler in handlers:
            package.removeHandler(handler)
            handler.close()

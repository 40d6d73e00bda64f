"""Files that are complete or absent. May import ``spidr.config`` only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from spidr.tools.errors import InputError


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under ``path`` complete and on disk, or not at all.

    Raises:
        InputError: If it cannot be written; whatever was at ``path`` is as it was.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.unlink(missing_ok=True)  # of a process killed before, or a link that leads elsewhere
        with aside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _rename(aside, path)
    except BaseException as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        if (cause := _disk_error(error)) is not None:
            raise InputError(
                f"{path}: cannot be written ({cause.strerror or cause}). What was saved before is intact: make room or "
                "choose another folder, then run the same command again."
            ) from error
        raise


def make_folder(path: Path) -> None:
    """Make a folder and those it is in, as far as they are missing.

    Raises:
        InputError: If it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: the folder cannot be made ({error.strerror}). Choose another one.") from error


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes have left of :func:`atomic_write` in a folder that nobody else writes to."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            path.unlink()


def _rename(aside: Path, path: Path) -> None:
    aside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or the rename may be lost when the machine stops
    finally:
        os.close(folder)


def _disk_error(error: BaseException | None) -> OSError | None:
    """The error of the file system behind an error: torch.save raises another one, about its archive."""
    while error is not None and not isinstance(error, OSError):
        if isinstance(error, InputError) or not isinstance(error, Exception):
            return None  # says what is wrong, or is no error
        error = error.__cause__ or error.__context__
    return error

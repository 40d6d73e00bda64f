"""Files that are complete or absent, and paths as people write them."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from spidr.tools.errors import InputError

logger = logging.getLogger(__name__)


def expand(path: str | os.PathLike[str]) -> Path:
    """Replace ``~`` and ``$VARIABLES`` in a path; unknown ones stay as they are."""
    return Path(os.path.expanduser(os.path.expandvars(path)))  # noqa: PTH111


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse pipes, devices and folders, which reading would wait for or fail on. A missing path passes.

    Raises:
        InputError: The path exists and is no regular file, or cannot be the name of a file.
    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116
    except OSError:
        return
    except ValueError as error:  # a NUL character
        raise InputError(f"{os.fspath(path)!r}: not the name of a file ({error}).") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: not a regular file.")


def find_files(folder: str | os.PathLike[str], wanted: Callable[[str], bool]) -> list[str]:
    """List the files below a folder, links followed, sorted.

    Args:
        folder: Where to look. A linked folder that leads back to one it is in is left out with a warning; hidden files
            (``._a.wav`` from macOS) are left out without one.
        wanted: Says of a file's name whether to list it.

    Raises:
        InputError: A folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: the folder cannot be read ({error.strerror}).")

    found: list[str] = []
    above = {os.fspath(folder): (os.path.realpath(folder),)}  # folder → itself and those it is in, links resolved
    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        ancestors = above.pop(here)
        for name in list(folders):
            path = os.path.join(here, name)  # noqa: PTH118
            real = os.path.realpath(path) if os.path.islink(path) else os.path.join(ancestors[0], name)  # noqa: PTH114, PTH118
            if real in ancestors:
                logger.warning("%s: leads back to %s, which it is in; not followed.", path, real)
                folders.remove(name)
            else:
                above[path] = (real, *ancestors)
        found += [os.path.join(here, name) for name in names if not name.startswith(".") and wanted(name)]  # noqa: PTH118
    return sorted(found)


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

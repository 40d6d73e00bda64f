"""Files that are complete or absent, and paths as users write them."""

import errno
import itertools
import json
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from spidr.tools.errors import InputError
from spidr.tools.lock import Process

logger = logging.getLogger(__name__)

_count = itertools.count()
_TEMPORARY = re.compile(r"\.spidr-([0-9a-f]*)-(\d+)-(\d*)-\d+\.tmp")

_REMEDIES = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT), "make room or choose another folder, then run the same command again"
    ),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that you may write to"),
    errno.ENOENT: "the folder is missing: make it or choose another one",
    errno.ENOTDIR: "part of the path is a file: choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "there is a folder of that name: choose another one",
    errno.EIO: "look at the disk, then run the same command again",
    errno.ESTALE: "look at the file server, then run the same command again",
}


def _why_not_written(path: str | Path, error: OSError) -> InputError:
    """Say why a file cannot be written, and suggest a remedy."""
    remedy = _REMEDIES.get(error.errno or 0, "choose another place")
    return InputError(f"{path}: cannot be written ({error.strerror or error}): {remedy}. What was saved is intact.")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn a file system error into an InputError that says why ``path`` cannot be written."""
    try:
        yield
    except OSError as error:
        raise _why_not_written(path, error) from error


def find_files(folder: str | os.PathLike[str], wanted: Callable[[str], bool]) -> list[str]:
    """List the files below a folder whose names are wanted, sorted. Links are followed.

    A linked folder that leads back to a parent is skipped with a warning; hidden files (macOS: ``._a.wav``) silently.

    Raises:
        InputError: A folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: the folder cannot be read ({error.strerror}).")

    found: list[str] = []
    # Each folder with its parents, links resolved.
    above: dict[str, tuple[str, ...]] = {os.fspath(folder): (os.path.realpath(folder),)}
    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        ancestors = above.pop(here)
        for name in list(folders):
            path = os.path.join(here, name)  # noqa: PTH118
            real = os.path.realpath(path) if os.path.islink(path) else os.path.join(ancestors[0], name)  # noqa: PTH114, PTH118
            if real in ancestors:
                logger.warning("%s: leads back to its parent %s; not followed.", path, real)
                folders.remove(name)
            else:
                above[path] = (real, *ancestors)
        found += [os.path.join(here, name) for name in names if not name.startswith(".") and wanted(name)]  # noqa: PTH118
    return sorted(found)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under ``path`` complete and on disk, or not at all.

    Raises:
        InputError: If it cannot be written; an existing file at ``path`` is unchanged.
    """
    process = Process.current()
    aside = path.with_name(f".spidr-{process.machine}-{process.pid}-{process.started}-{next(_count)}.tmp")
    try:
        with aside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _rename(aside, path)
    except BaseException as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        cause = _disk_error(error)
        if cause is not None and cause.filename in (None, str(aside), aside):
            raise _why_not_written(path, cause) from error
        raise


def write_json(path: Path, document: Any, *, indent: int | None = None) -> None:
    """Write a JSON file with :func:`atomic_write`."""
    with atomic_write(path) as file:
        file.write(json.dumps(document, indent=indent).encode() + b"\n")


def make_folder(path: Path) -> None:
    """Create a folder and its parents. Raises InputError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: the folder cannot be made ({error.strerror}). Choose another one.") from error


def remove_unfinished(folder: Path) -> None:
    """Remove what :func:`atomic_write` left in a folder when its process was killed."""
    for path in folder.glob(".spidr-*.tmp"):
        if (found := _TEMPORARY.fullmatch(path.name)) is None:
            continue
        with suppress(OSError):
            alive = Process(found[1], int(found[2]), found[3]).is_alive()
            # What another machine left counts as left behind after a day.
            if alive is False or (alive is None and time.time() - path.stat().st_mtime > 86_400):
                path.unlink()


def expand(path: str | Path) -> Path:
    """Expand ``~`` and ``$VARIABLES`` in a user's path.

    Raises:
        InputError: It is empty, or names an unset variable or an unknown user.
    """
    if not str(path):
        raise InputError("a path is empty: is a shell variable not set?")
    expanded = os.path.expanduser(os.path.expandvars(path))  # noqa: PTH111 (pathlib knows no variables)
    if expanded != str(path) or not os.path.lexists(expanded):
        if missing := re.search(r"\$(\w+|\{\w+\})", expanded):
            raise InputError(f"{path}: the environment variable {missing[0]} is not set")
        if expanded.startswith("~"):
            raise InputError(f"{path}: there is no such user")
    return Path(expanded)


def check_file(path: str | Path) -> None:
    """Check that a path is a regular file: opening a pipe or device may take forever. Raises InputError if not."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read ({reason})") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise InputError(f"{path}: cannot be read (it is {kind}, not a file)")


def _rename(aside: Path, path: Path) -> None:
    aside.replace(path)
    if os.name != "posix":
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # otherwise a crash of the machine may lose the rename
    finally:
        os.close(folder)


def _disk_error(error: BaseException | None) -> OSError | None:
    """The file system error behind an error of torch.save or polars."""
    while isinstance(error, Exception) and not isinstance(error, InputError):  # which already says what is wrong
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            return OSError(int(number[1]), os.strerror(int(number[1])))
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None

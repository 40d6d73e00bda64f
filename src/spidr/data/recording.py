"""Where a recording is: a file, a member of an uncompressed archive, or a span of either."""

import io
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from spidr.tools.errors import InputError
from spidr.tools.files import check_file


class Recording(NamedTuple):
    """A file or a member of an uncompressed archive, or a span of either."""

    path: str  # path of the file, or name of the archive's member
    archive: str | None = None
    byte_offset: int = 0  # where the member starts in the archive
    byte_size: int = 0  # size of the member
    start: float | None = None  # span, in seconds
    end: float | None = None
    mean: float | None = None  # of the samples, if known
    std: float | None = None
    content: bytes | None = None  # content of the file, if in memory

    def __str__(self) -> str:
        name = self.path if self.archive is None else f"{self.archive}:{self.path}"
        if self.start is None and self.end is None:
            return name
        return f"{name} [{self.start or 0:g} s to {'its end' if self.end is None else f'{self.end:g} s'}]"


Source = str | Path | bytes | Recording
"""A path, the bytes of an audio file, or a recording of a manifest."""


def as_recording(source: Source) -> Recording:
    """Turn a path or bytes into a recording."""
    if isinstance(source, bytes):
        return Recording(f"<{len(source)} bytes of audio>", content=source)
    return source if isinstance(source, Recording) else Recording(os.fspath(source))


def check_exists(path: str) -> None:
    """Check that a recording's file exists and is a regular file: reading anything else could take forever."""
    if not os.path.lexists(path):
        raise InputError(f"{path}: the file does not exist. Was it moved since it was listed?")
    check_file(path)


class Member(io.RawIOBase):
    """A member of an archive, as a file.

    Each archive is opened once per process. Reads are positional, so threads and forked processes can share it.

    Raises:
        InputError: The archive does not exist or is too short.
    """

    def __init__(self, recording: Recording) -> None:
        archive = recording.archive or ""
        check_exists(archive)
        status = os.stat(archive)  # noqa: PTH116
        self._archive = _open(archive, status.st_ino, status.st_mtime_ns)
        self._offset, self._size, self._position = recording.byte_offset, recording.byte_size, 0
        if self._offset + self._size > status.st_size:
            raise InputError(f"{recording}: lies past the end of the archive; write the manifest again.")

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position within the member."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the current position, up to the member's end."""
        view = memoryview(buffer)[: max(0, self._size - self._position)]
        count = os.preadv(self._archive.fileno(), [view], self._offset + self._position) if len(view) else 0
        self._position += count
        return count


class _Archive(io.FileIO):
    """An open archive, closed with its last reference."""

    def __del__(self) -> None:
        self.close()


@lru_cache(maxsize=64)
def _open(path: str, inode: int, modified: int) -> _Archive:  # noqa: ARG001
    """Open an archive, unless the same file is already open."""
    return _Archive(path)

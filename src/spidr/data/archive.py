"""Members of uncompressed archives as files, without unpacking. May import ``spidr.config`` and its siblings."""

from __future__ import annotations

import io
import os
import stat
from functools import lru_cache
from typing import Any

from spidr.tools.errors import InputError


class Member(io.RawIOBase):
    """``size`` bytes of an archive from ``offset`` on, as a file.

    Every archive is opened once per process. Each read says where it starts, so that nothing depends on a position that
    processes and threads would have to share.

    Raises:
        InputError: The archive cannot be opened or is too short.
    """

    def __init__(self, archive: str, name: str, offset: int, size: int) -> None:
        try:
            status = os.stat(archive)  # noqa: PTH116
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{archive}: the archive is not a regular file.")
            self._archive = _open(archive, status.st_ino, status.st_mtime_ns)
        except FileNotFoundError:
            raise InputError(
                f"{archive}: the archive does not exist. Was it moved since the manifest was written?"
            ) from None
        except OSError as error:
            raise InputError(f"{archive}: the archive cannot be opened ({error.strerror}).") from None
        if offset + size > status.st_size:
            raise InputError(f"{archive}:{name}: lies past the end of the archive; write the manifest again.")
        self._offset, self._size, self._position = offset, size, 0

    def readable(self) -> bool:
        """Whether it can be read."""
        return True

    def seekable(self) -> bool:
        """Whether the position can be changed."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position within the member."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readall(self) -> bytes:
        """The bytes from the current position to the member's end."""
        pieces = []
        while self._position < self._size:  # Linux reads 2 GiB at once at most
            count = self._size - self._position
            piece = os.pread(self._archive.descriptor, count, self._offset + self._position)
            if not piece:
                break
            pieces.append(piece)
            self._position += len(piece)
        return b"".join(pieces)

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the current position, up to the member's end."""
        view = memoryview(buffer)[: max(0, self._size - self._position)]
        count = os.preadv(self._archive.descriptor, [view], self._offset + self._position) if len(view) else 0
        self._position += count
        return count


class _Archive:
    """An open archive; closed when nothing refers to it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=64)
def _open(path: str, inode: int, modified: int) -> _Archive:  # noqa: ARG001
    """Open an archive, unless it is open already and still the same file."""
    return _Archive(path)

"""Lines of tables, plain or gzipped, from files that may be anything."""

from __future__ import annotations

import gzip
import zlib
from typing import TYPE_CHECKING

from spidr.tools.errors import InputError, first_line
from spidr.tools.files import check_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MAX_LINE = 1 << 26
"""Bytes of a line at most: a day of speech takes less, and a gzipped file of a few kilobytes could hold a gigabyte."""


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank, one at a time.

    Raises:
        InputError: It cannot be read, is damaged or no text, or has a line that is too long.
    """
    check_file(path)
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise InputError(f"{path}: line {number}: longer than {MAX_LINE >> 20} MiB.")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, text
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: line {number}: not UTF-8 text ({error.reason}).") from None
    except (OSError, ValueError, EOFError, zlib.error) as error:  # ValueError: a NUL character in the path
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path}: cannot be read ({reason}).") from None


def split_row(header: Sequence[str], line: str) -> dict[str, str]:
    """The values of a line by the names of their columns; none if they are not as many.

    Separated by tabs, or else by blanks, of which those before the last columns are part of the first one: a name.
    """
    values = line.rsplit("\t" if "\t" in line else None, len(header) - 1)
    if len(values) != len(header):
        return {}
    return {name: value.strip() for name, value in zip(header, values, strict=True)}

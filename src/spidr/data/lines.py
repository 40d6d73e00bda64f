"""Read tables line by line, plain or gzipped."""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from spidr.tools.errors import InputError, first_line
from spidr.tools.files import check_file

MAX_LINE = 1 << 26
"""Longest line in bytes: a day of units is shorter, but a small gzipped file may hold a line of gigabytes."""


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and text of each line that is not blank.

    Raises:
        InputError: The file cannot be read, is damaged or not text, or a line is too long.
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
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path}: cannot be read ({reason}).") from None


def split_row(header: Sequence[str], line: str) -> dict[str, str]:
    """Split a line into its columns, by tabs, else by blanks; empty if there are too few.

    The first column, a name, may contain blanks.
    """
    values = line.rsplit("\t" if "\t" in line else None, len(header) - 1)
    if len(values) != len(header):
        return {}
    return {name: value.strip() for name, value in zip(header, values, strict=True)}

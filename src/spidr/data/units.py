"""Reading discrete units: one sequence for each recording."""

from __future__ import annotations

from collections.abc import Iterator
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spidr.data.json_lines import read_lines
from spidr.tools.errors import InputError, first_line
from spidr.tools.lazy import needs_extra
from spidr.tools.untrusted import check_memory, parse_json

Units = dict[str, NDArray[np.int64]]
"""Name of a recording → its units, one per frame."""


def read_units(path: str | Path) -> Units:
    """Read the units of recordings.

    Args:
        path: JSON lines (also gzipped, ``.gz``) or Parquet (``.parquet``), with the recording's ``fileid`` (or
            ``name``, or ``audio``, of which the file's stem counts), its ``units`` and, if runs of the same unit are
            merged, ``durations`` in frames.

    Returns:
        For each recording its units, one per frame, with merged runs written out again.

    Raises:
        InputError: The file is missing, a row is not of this form, or a recording occurs twice.
    """
    path, units, frames = Path(path), {}, 0
    for number, row in _rows(path):
        try:
            name, sequence, durations = _parse(row)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            raise InputError(
                f"{path}: row {number}: expected `fileid` and `units`, a list of integers, and perhaps `durations`, as "
                f"many; found {str(row)[:80]}."
            ) from None
        if name in units:
            raise InputError(f"{path}: row {number}: {name!r} occurs twice.")
        frames += len(sequence) if durations is None else sum(durations.tolist())
        check_memory(8 * frames, f"{path}: row {number}: all units up to here")
        units[name] = sequence if durations is None else sequence.repeat(durations)
    if not units:
        raise InputError(f"{path}: no units in the file.")
    return units


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix != ".parquet":
        for number, line in read_lines(path):
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise InputError(f"{path}: row {number}: not JSON ({error}).") from None
        return
    with needs_extra("train"):
        import polars as pl  # takes longer to import than most files of units to read

    try:
        rows = pl.read_parquet(escape(str(path))).to_dicts()
    except OSError as error:
        raise InputError(f"{path}: the units cannot be read ({error.strerror or error}).") from None
    except (ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise InputError(f"{path}: not Parquet ({first_line(error)}).") from None
    yield from enumerate(rows, start=1)


def _parse(row: dict[str, Any]) -> tuple[str, NDArray[np.int64], NDArray[np.int64] | None]:
    name = row.get("fileid", row.get("name"))
    name = Path(row["audio"]).stem if name is None else name
    units, durations = _integers(row["units"]), row.get("durations")
    if not isinstance(name, str):
        raise TypeError
    if durations is None:
        return name, units, None
    counts = _integers(durations)
    if counts.shape != units.shape or (counts < 0).any():
        raise ValueError
    return name, units, counts


def _integers(values: Any) -> NDArray[np.int64]:
    if not isinstance(values, list) or not set(map(type, values)) <= {int}:
        raise TypeError
    return np.array(values, dtype=np.int64)

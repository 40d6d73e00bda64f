"""Reading discrete units: one sequence for each recording. May import ``spidr.config``."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spidr.config import InputError

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
    path, units = Path(path), {}
    for number, row in enumerate(_rows(path), start=1):
        try:
            name, sequence = _parse(row)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(
                f"{path}: row {number}: expected `fileid` and `units`, a list of integers, and perhaps `durations`, as "
                f"many; found {str(row)[:80]}."
            ) from None
        if name in units:
            raise InputError(f"{path}: row {number}: {name!r} occurs twice.")
        units[name] = sequence
    if not units:
        raise InputError(f"{path}: no units in the file.")
    return units


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            return _parquet_rows(path)
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        return [json.loads(line) for line in content.splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"{path}: the units cannot be read ({error.strerror or error}).") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not JSON lines or Parquet ({str(error).splitlines()[0]}).") from None


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import polars as pl  # takes longer to import than most files of units to read

    try:
        return pl.read_parquet(path).to_dicts()
    except pl.exceptions.PolarsError as error:
        raise ValueError(error) from None


def _parse(row: dict[str, Any]) -> tuple[str, NDArray[np.int64]]:
    name = row.get("fileid", row.get("name"))
    name = Path(row["audio"]).stem if name is None else name
    units = np.array(row["units"])
    if not isinstance(name, str) or units.ndim != 1 or (units.size and units.dtype.kind not in "iu"):
        raise TypeError
    if (durations := row.get("durations")) is not None:
        if len(durations) != len(units):
            raise ValueError
        units = units.repeat(np.array(durations, dtype=np.int64))
    return name, units.astype(np.int64)

"""Read discrete units, one sequence per recording, in the formats of several programs."""

import ast
import os
from collections.abc import Iterator, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spidr.data.lines import read_lines
from spidr.data.names import plain_name
from spidr.tools.errors import InputError, first_line
from spidr.tools.files import check_file, expand, find_files
from spidr.tools.lazy import needs_extra
from spidr.tools.untrusted import check_memory, parse_json

Units = dict[str, NDArray[np.int64]]
"""Name of a recording → its units, one per frame."""

MAX_FRAMES = 86_400 * 100
"""Most frames in a recording, a day at 100 per second; otherwise durations in a short line could ask for any number."""

EXPECTED = "expected `fileid` and `units`, integers, and perhaps `durations`, as many, as JSON; or NAME|UNITS"


def read_units(path: str | Path, *, names: Sequence[str] | None = None) -> Units:
    """Read the units of recordings.

    Args:
        path: Lines of JSON or of Python's dictionaries (also gzipped, ``.gz``) or Parquet (``.parquet``) with the
            recording's ``fileid`` (or ``name``, ``file``, ``file_name``, ``audio``), its ``units`` (or ``hubert``), a
            list or text, and, if runs of the same unit are merged, ``durations`` (or ``duration``) in frames. Or text:
            lines ``NAME|71 12 …``, or units alone (``.km``). Or a folder of ``.npy`` files, one per recording, at any
            depth.
        names: The recordings of lines without names, in order. None: those of the fairseq manifest (``.tsv``) beside
            the file.

    Returns:
        Each recording's units, one per frame, with merged runs expanded.

    Raises:
        InputError: The file is missing, a row has another form, or a recording occurs twice.
    """
    path, units, frames = expand(path), {}, 0
    for place, row in _rows(path, names):
        try:
            name, sequence, durations = _parse(row)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            raise InputError(f"{path}: {place}: {EXPECTED}; found {str(row)[:80]}.") from None
        if name in units:
            raise InputError(f"{path}: {place}: {name[:200]!r} occurs twice.")
        length = len(sequence) if durations is None else sum(durations.tolist())
        if length > MAX_FRAMES:
            raise InputError(f"{path}: {place}: {length:,} units, more than a recording of a day has.")
        frames += length
        check_memory(8 * frames, f"{path}: {place}: all units up to here")
        units[name] = sequence if durations is None else sequence.repeat(durations)
    if not units:
        raise InputError(f"{path}: no units in the {'folder' if os.path.isdir(path) else 'file'}.")  # noqa: PTH112
    return units


def read_record(path: Path) -> dict[str, Any]:
    """Read the record that ``spidr.extract`` wrote beside units or into a folder of features; empty if there is none.

    Raises:
        InputError: The record cannot be read.
    """
    folder = os.path.isdir(path)  # noqa: PTH112 (False for all that cannot be a folder)
    file = path / "extract.json" if folder else path.with_name(f"{path.name}.json")
    if not os.path.lexists(file):
        return {}
    check_file(file)
    try:
        made = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: how the frames were made cannot be read ({first_line(error)}).") from None
    return made if isinstance(made, dict) else {}


def _rows(path: Path, names: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    """Yield each recording's place in the file, for messages, and its row."""
    if os.path.isdir(path):  # noqa: PTH112 (False for all that cannot be a folder)
        return _arrays(path)
    if path.suffix == ".parquet":
        return _parquet(path)
    return _named(path, names) if path.suffix == ".km" else _lines(path)


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in read_lines(path):
        name, bar, sequence = line.rpartition("|")
        row: Any = {"name": name.strip(), "units": sequence} if bar else {"units": line}
        if line[0] in "{[":
            try:
                # Unit vocoders' tools print Python's dictionaries.
                row = _parse_python(line) if line.startswith("{'") else parse_json(line)
            except ValueError as error:
                raise InputError(f"{path}: row {number}: not JSON ({error}).") from None
        yield f"row {number}", row


def _parse_python(text: str) -> Any:
    """Parse a Python literal. Raises ValueError if it is none, or is nested too deeply."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"nor a Python literal: {first_line(error)}") from None


def _named(path: Path, names: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    lines, manifest = list(read_lines(path)), path.with_suffix(".tsv")
    if names is None and not manifest.exists():
        raise InputError(f"{path}: lines without names; give --manifest, or put {manifest.name} beside it.")
    if names is None:  # fairseq's: the folder, then a path and a number of samples per line
        names = [plain_name(line.split("\t")[0]) for _, line in list(read_lines(manifest))[1:]]
    if len(names) != len(lines):
        raise InputError(f"{path}: {len(lines)} lines, but {len(names)} recordings in the manifest.")
    named = zip(names, lines, strict=True)
    return ((f"row {number}", {"name": name, "units": line.rpartition("|")[2]}) for name, (number, line) in named)


def _arrays(folder: Path) -> Iterator[tuple[str, Any]]:
    for file in find_files(folder, lambda name: name.endswith(".npy")):
        name = Path(file).relative_to(folder).with_suffix("").as_posix()
        check_file(file)
        try:
            array = np.load(file, mmap_mode="r")
            if array.ndim != 1 or not (array.dtype.kind in "iu" or _whole(array)):
                raise ValueError(f"{array.dtype} of shape {array.shape}, expected a vector of integers")
        except Exception as error:  # a damaged file can fail in any way
            raise InputError(f"{file}: no units of a recording ({first_line(error)})") from None
        yield name, {"name": name, "units": array}


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    check_file(path)
    with needs_extra("train"):
        import polars as pl  # importing it takes longer than reading most files of units

    try:
        rows = pl.read_parquet(escape(str(path))).to_dicts()
    except OSError as error:
        raise InputError(f"{path}: the units cannot be read ({error.strerror or error}).") from None
    except (ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise InputError(f"{path}: not Parquet ({first_line(error)}).") from None
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _parse(row: dict[str, Any]) -> tuple[str, NDArray[np.int64], NDArray[np.int64] | None]:
    names = (row.get(key) for key in ("fileid", "name", "file", "file_name", "audio"))
    name = next((name for name in names if name is not None), None)
    units = _integers(row["units"] if "units" in row else row.get("hubert"))
    given = (row.get("durations"), row.get("duration"))
    # A single number is the recording's length in seconds, as in unit vocoders' files.
    durations = next((value for value in given if isinstance(value, (list, str, np.ndarray))), None)
    counts = None if durations is None else _integers(durations)
    if not isinstance(name, str) or (counts is not None and (counts.shape != units.shape or (counts < 0).any())):
        raise TypeError
    return name, units, counts


def _integers(values: Any) -> NDArray[np.int64]:
    if isinstance(values, np.ndarray):
        return values.astype(np.int64)
    if isinstance(values, str):
        return np.array(values.split(), dtype=np.int64)
    if not isinstance(values, list) or not set(map(type, values)) <= {int, float}:
        raise TypeError
    array = np.array(values or [0])[: len(values)]
    if array.dtype != np.int64 and not _whole(array):
        raise ValueError
    return array.astype(np.int64)


def _whole(array: NDArray[Any]) -> bool:
    """Whether floats are integers, as other programs write 27.0."""
    return array.dtype.kind == "f" and bool(((array == np.floor(array)) & (abs(array) < 2**53)).all())

"""Reading manifests: tables that say where each recording is and how long."""

from __future__ import annotations

import csv
import os
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from spidr.data.json_lines import read_lines
from spidr.tools.errors import InputError, first_line
from spidr.tools.untrusted import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUIRED = {"fileid": pl.String, "path": pl.String, "num_samples": pl.Int64}
ARCHIVE = {"archive": pl.String, "byte_offset": pl.Int64, "byte_size": pl.Int64}
STATISTICS = {"mean": pl.Float64, "std": pl.Float64}
SCHEMA: dict[str, Any] = REQUIRED | ARCHIVE | STATISTICS

EXTRA = "values without a column"


def read_manifest(path: str | Path) -> pl.DataFrame:
    """Read a manifest: CSV (``.csv``), JSON lines (``.jsonl``) or fairseq's ``.tsv``.

    Args:
        path: The manifest. CSV and JSON lines need the columns ``fileid`` (file name without extension), ``path``
            (absolute) and ``num_samples``. Recordings inside uncompressed tar archives also have ``archive``,
            ``byte_offset`` and ``byte_size``, and ``path`` is the member's name. ``mean`` and ``std`` of the samples
            are optional. A ``.tsv`` has the root folder on its first line, then ``relative/path<TAB>num_samples``.

    Returns:
        One row per recording, in the file's order, with those of the columns above that the file has. Others are
        ignored. ``fileid`` and ``path`` are always strings.

    Raises:
        InputError: The file is missing, has no row, lacks a column or holds a value of the wrong type.
    """
    path = Path(path)
    if not os.path.isfile(path):  # noqa: PTH113 (False for all that cannot be a file)
        raise InputError(f"{path}: the manifest does not exist. Write one with `python -m spidr.data.write_manifest`.")
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".tsv": _read_fairseq}
    if path.suffix not in readers:
        raise InputError(f"{path}: a manifest is a .csv, .jsonl or (fairseq) .tsv file, not {path.suffix or 'this'!r}.")
    try:
        manifest = readers[path.suffix](path)
    except OSError as error:
        raise InputError(f"{path}: the manifest cannot be read ({error.strerror or error}).") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file ({error}).") from None
    except (csv.Error, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise InputError(f"{path}: the manifest cannot be read: {first_line(error)}.") from None
    if manifest.is_empty():
        raise InputError(f"{path}: the manifest has no row.")
    _check_values(path, manifest)
    return manifest


def _check_columns(path: Path, found: list[str]) -> list[str]:
    """The columns of the file to read."""
    needed = [*REQUIRED, *(ARCHIVE if "archive" in found else ())]
    if missing := [column for column in needed if column not in found]:
        raise InputError(f"{path}: column {missing[0]!r} is missing. Columns found: {', '.join(found) or 'none'}.")
    with_statistics = all(column in found for column in STATISTICS)
    return [*needed, *(STATISTICS if with_statistics else ())]


def _check_values(path: Path, manifest: pl.DataFrame) -> None:
    """No value missing that is needed, no length or position below zero, no statistics that are not numbers."""
    in_file = manifest["archive"].is_null() if "archive" in manifest.columns else None
    for column in manifest.columns:
        values = manifest[column]
        if column in STATISTICS:  # Missing ones are computed when needed.
            bad = ~values.fill_null(0.0).is_finite() | (values.fill_null(0.0) < 0 if column == "std" else False)
        else:
            bad = values.is_null() if in_file is None or column in REQUIRED else values.is_null() & ~in_file
            if values.dtype == pl.Int64:
                bad |= values.fill_null(0) < 0
            else:
                bad |= values.fill_null("").str.contains("\0", literal=True)
        if bad.any():
            row = int(bad.arg_max() or 0)
            found = "nothing" if values[row] is None else _cut(values[row])
            raise InputError(f"{path}: row {row + 1}, column {column!r}: found {found}, expected {_expected(column)}.")


def _expected(column: str) -> str:
    return {pl.String: "a string", pl.Int64: "an integer of at least 0", pl.Float64: "a number"}[SCHEMA[column]]


def _read_csv(path: Path) -> pl.DataFrame:
    with path.open(encoding="utf-8-sig", newline="") as file:
        columns = _check_columns(path, next(csv.reader(file), []))
    schema = {column: SCHEMA[column] for column in columns}
    try:
        return pl.read_csv(escape(str(path)), columns=columns, schema_overrides=schema).select(columns)
    except pl.exceptions.PolarsError as error:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = (
                {name: _number(value) for name, value in row.items()} for row in csv.DictReader(file, restkey=EXTRA)
            )
            raise _bad_row(path, columns, rows, error) from None


def _number(value: Any) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except (TypeError, ValueError):
            continue
    return value


def _read_jsonl(path: Path) -> pl.DataFrame:
    try:
        first: Any = parse_json(next((line for _, line in read_lines(path)), "null"))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: row 1 is not a line of JSON ({error}).") from None
    if first is None:
        raise InputError(f"{path}: the manifest has no row.")
    if not isinstance(first, dict):
        raise InputError(f"{path}: row 1 is not a JSON object with the columns {', '.join(REQUIRED)}.")
    columns = _check_columns(path, list(first))
    try:
        return pl.read_ndjson(escape(str(path)), schema={column: SCHEMA[column] for column in columns})
    except pl.exceptions.PolarsError as error:
        with path.open(encoding="utf-8", errors="replace") as file:
            raise _bad_row(path, columns, (_parse(line) for line in file if line.strip()), error) from None


def _parse(line: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _bad_row(path: Path, columns: list[str], rows: Iterator[dict[str, Any]], error: Exception) -> InputError:
    """Read again, slowly, to name the row that the fast reader stumbled over."""
    types = {pl.String: str | int | float, pl.Int64: int, pl.Float64: int | float}
    for number, row in enumerate(rows, start=1):
        if extra := row.get(EXTRA):
            return InputError(f"{path}: row {number} has more values than there are columns: {_cut(extra)}.")
        for column in columns:
            value = row.get(column)
            if not (isinstance(value, types[SCHEMA[column]]) or (value in (None, "") and column not in REQUIRED)):
                found = "nothing" if value is None else _cut(value)
                return InputError(
                    f"{path}: row {number}, column {column!r}: found {found}, expected {_expected(column)}."
                )
    return InputError(f"{path}: the manifest cannot be read: {first_line(error)}.")


def _cut(value: Any) -> str:
    return repr(value)[:200]


def _read_fairseq(path: Path) -> pl.DataFrame:
    with path.open(encoding="utf-8-sig") as file:
        root = file.readline().rstrip("\n")
    if not root or "\t" in root:
        raise InputError(f"{path}: row 1 must be the root folder of the recordings; found {_cut(root)}.")
    # Cut at the tab by us: names may hold quotes, and a bad line can be named.
    lines = pl.read_csv(
        escape(str(path)),
        separator="\n",
        has_header=False,
        skip_rows=1,
        quote_char=None,
        schema={"line": pl.String},
        raise_if_empty=False,
    )
    table = lines.select(
        path=pl.col("line").str.extract(r"^([^\t]+)\t"),
        num_samples=pl.col("line").str.extract(r"^[^\t]+\t(\d+)\s*$").cast(pl.Int64, strict=False),
    )
    bad = table["num_samples"].is_null()
    if bad.any():
        row = int(bad.arg_max() or 0)
        raise InputError(f"{path}: row {row + 2} must be `relative/path<TAB>num_samples`; found {_cut(lines[row, 0])}.")
    relative = pl.col("path")
    name = relative.str.split("/").list.last()
    return table.select(
        fileid=pl.when(name.str.contains(r"^.+\.")).then(name.str.replace(r"\.[^.]*$", "")).otherwise(name),
        path=pl.when(relative.str.starts_with("/")).then(relative).otherwise(pl.lit(root.rstrip("/") + "/") + relative),
        num_samples="num_samples",
    )

"""Read manifests and lists of recordings: their locations, names and lengths."""

import codecs
import csv
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import polars.selectors as cs
from numpy.typing import NDArray

from spidr.config import SAMPLE_RATE
from spidr.data.lines import read_lines
from spidr.data.recording import Recording
from spidr.tools.errors import InputError, first_line, some
from spidr.tools.files import check_file, expand
from spidr.tools.untrusted import parse_json

REQUIRED = {"fileid": pl.String, "path": pl.String, "num_samples": pl.Int64}
ARCHIVE = {"archive": pl.String, "byte_offset": pl.Int64, "byte_size": pl.Int64}
SPAN = {"start": pl.Float64, "end": pl.Float64}
STATISTICS = {"mean": pl.Float64, "std": pl.Float64}
SCHEMA: dict[str, Any] = REQUIRED | ARCHIVE | SPAN | STATISTICS
PLACE = tuple(name for name in Recording._fields if name in SCHEMA)  # columns that locate a recording

GUIDE = "pretrain.md#2-list-the-recordings"
TABLES = {".csv", ".tsv", ".jsonl", ".ndjson", ".txt", ".lst", ".list", ".scp"}
"""Suffixes of manifests and lists. Kaldi's ``segments`` has none."""

HEAD = 1 << 16  # bytes at the start of a file that show its format
_COUNT = r"\d+(?:\.0+)?"  # some programs write 16000.0


def read_manifest(path: str | Path | Sequence[str | Path], *, needs_audio: bool = False) -> pl.DataFrame:
    """Read a manifest or a list of recordings.

    The first lines show the format, except Kaldi's, which goes by the file's name:

    - a table with a header line (CSV, or with tabs or semicolons), or JSON lines, with the columns ``path`` and
      ``num_samples`` and, optionally, ``fileid`` (default: the file's name without its extension). Recordings inside
      uncompressed tar archives also have ``archive``, ``byte_offset`` and ``byte_size``, and ``path`` is the member's
      name. ``start`` and ``end`` in seconds name a span of a longer recording; the row's length then follows from them.
      ``mean`` and ``std`` of the samples are optional.
    - fairseq's ``.tsv``: the root folder on the first line, then ``relative/path<TAB>num_samples``.
    - Kaldi's ``.scp`` (``name path``) and ``segments`` (``name recording start end``, with a ``wav.scp`` beside it).
    - a list of paths, one per line.

    Relative paths are tried in the current folder, then beside the file. ``~`` and ``$VARIABLES`` are expanded.

    Args:
        path: The file, or several, whose rows are joined.
        needs_audio: Whether a table of names and lengths without ``path`` is an error.

    Returns:
        One row per recording, in the file's order: the columns above that the file has, ``fileid`` always, then the
        file's other columns. ``fileid`` and ``path`` are strings. Lists have no ``num_samples``.

    Raises:
        InputError: The file is missing, has no row, lacks a column or holds a value of the wrong type.
    """
    if not isinstance(path, (str, Path)):
        return read_manifests(path, needs_audio=needs_audio)[0]
    path = expand(path)
    if not os.path.exists(path):  # noqa: PTH110 (False for all that cannot be a file)
        raise InputError(
            f"{path}: the manifest does not exist. Write one with `python -m spidr.data.write_manifest`.", guide=GUIDE
        )
    check_file(path)
    try:
        if not _head(path).strip():
            raise InputError(f"{path}: the manifest has no row.")
        manifest = _reader(path)(path)
    except OSError as error:
        raise InputError(f"{path}: the manifest cannot be read ({error.strerror or error}).") from None
    except UnicodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file ({error}).") from None
    except (csv.Error, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise InputError(f"{path}: the manifest cannot be read: {first_line(error)}.") from None
    blank = cs.string().str.strip_chars().fill_null("") == ""
    manifest = manifest.filter(~pl.all_horizontal(blank, (~cs.string()).is_null()))
    if manifest.is_empty():
        raise InputError(f"{path}: the manifest has no row.")
    return _located(_named(_typed(path, manifest, needs_audio=needs_audio)), path)


def read_manifests(paths: Sequence[str | Path], *, needs_audio: bool = False) -> tuple[pl.DataFrame, pl.Series]:
    """Read several manifests as one, with the number of the manifest that each row comes from."""
    tables = [read_manifest(path, needs_audio=needs_audio) for path in paths]
    if len({"num_samples" in table.columns for table in tables}) > 1:
        raise InputError(
            f"{', '.join(map(str, paths))}: only some of them say how long recordings are; write manifests of all."
        )
    sources = pl.concat([pl.repeat(i, table.height, dtype=pl.Int32, eager=True) for i, table in enumerate(tables)])
    return pl.concat(tables, how="diagonal_relaxed"), sources


def recordings_of(manifest: pl.DataFrame, rows: NDArray[np.integer[Any]] | None = None) -> list[Recording]:
    """The recordings of some rows (None: all)."""
    columns = manifest.select(name for name in PLACE if name in manifest.columns)
    chosen = columns if rows is None else columns[rows]
    return [Recording(**row) for row in chosen.iter_rows(named=True)]


def iter_recordings(manifest: pl.DataFrame) -> Iterator[Recording]:
    """Yield all recordings, with a few thousand in memory at a time."""
    for rows in manifest.iter_slices(4096):
        yield from recordings_of(rows)


def is_table(path: str | Path) -> bool:
    """Whether a file is a manifest or list: by its suffix, or because it is text."""
    path = Path(path)
    if path.suffix.lower() in TABLES or path.name == "segments":
        return True
    try:
        check_file(path)
        return bool(_head(path).strip()) and path.suffix.lower() not in (".json", ".toml")
    except (OSError, InputError, UnicodeError):
        return False


def _head(path: Path) -> str:
    """Read the start of a text file. Raises UnicodeError if it is not text."""
    with path.open("rb") as file:
        raw = file.read(HEAD)
    if b"\0" in raw:
        raise UnicodeError("it holds a NUL character")
    return codecs.getincrementaldecoder("utf-8-sig")().decode(raw)


def _reader(path: Path) -> Callable[[Path], pl.DataFrame]:
    suffix, lines = path.suffix.lower(), [line for line in _head(path).splitlines() if line.strip()]
    if suffix == ".scp":
        return _read_scp
    if path.name == "segments":
        return _read_segments
    if lines[0].lstrip()[0] in "{[" or suffix in (".jsonl", ".ndjson"):
        return _read_jsonl
    cells = {cell.strip(' "') for cell in re.split("[,;\t]", lines[0])}
    if cells & REQUIRED.keys() or suffix == ".csv":
        return _read_csv
    if suffix == ".tsv" or re.fullmatch(rf".+\t{_COUNT}\s*", "".join(lines[1:2])):
        return _read_fairseq
    return lambda path: _lines(path).to_frame("path")


# --------------------------------------------------------------------------------------------------------------------
# One reader per format: the file's columns, of any type


def _read_csv(path: Path) -> pl.DataFrame:
    header = next(line for line in _head(path).splitlines() if line.strip())
    separator = max("\t;,", key=header.count)
    names = next(csv.reader([header], delimiter=separator))
    strings = {name: pl.String for name in names if name.strip() in SCHEMA}
    options: dict[str, Any] = {"separator": separator, "schema_overrides": strings}
    for first in (1000, None):  # all rows, if later values are unlike the first
        with suppress(pl.exceptions.ComputeError):
            table = pl.read_csv(escape(str(path)), infer_schema_length=first, **options)
            break
    else:
        table = _read_odd_csv(path, separator)
    if any(name != name.strip() for name in table.columns):  # a header like "path, num_samples"
        table = table.with_columns(pl.col(pl.String).str.strip_chars()).rename(str.strip)
    return table


def _read_odd_csv(path: Path, separator: str) -> pl.DataFrame:
    """Read tables that polars refuses: quotes within values, separators at the ends of lines."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = filter(None, csv.reader(file, delimiter=separator))
        columns, table = next(rows), []
        for number, row in enumerate(rows, start=1):
            if any(row[len(columns) :]):
                rest = _cut(row[len(columns) :])
                raise InputError(f"{path}: row {number} has more values than there are columns: {rest}.")
            table.append([value or None for value in row[: len(columns)]] + [None] * (len(columns) - len(row)))
    return pl.DataFrame(table, schema=dict.fromkeys(columns, pl.String), orient="row")


def _read_jsonl(path: Path) -> pl.DataFrame:
    with suppress(pl.exceptions.PolarsError, pl.exceptions.PanicException):
        table = pl.read_ndjson(escape(str(path)), infer_schema_length=None)  # from all rows: columns may begin late
        numbers = [name for name in ("fileid", "path") if table.schema.get(name) == pl.Float64]
        if numbers:  # 1 would become 1.0 if other names are fractions
            strings = dict.fromkeys(numbers, pl.String)
            table = pl.read_ndjson(escape(str(path)), infer_schema_length=None, schema_overrides=strings)
        return table
    # What polars refuses: a byte order mark, mistakes.
    rows = []
    for number, (_, line) in enumerate(read_lines(path), start=1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise InputError(f"{path}: row {number} is not a line of JSON ({error}).") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is not a JSON object with `path` and `num_samples`.")
        rows.append(row | {name: str(row[name]) for name in SCHEMA if row.get(name) is not None})
    return pl.DataFrame(rows, infer_schema_length=None, strict=False)


def _lines(path: Path, skip: int = 0) -> pl.Series:
    """Read the lines that are not blank, stripped of surrounding white space."""
    # Not as CSV: names may contain quotes.
    options: dict[str, Any] = {"separator": "\n", "has_header": False, "quote_char": None, "raise_if_empty": False}
    table = pl.read_csv(escape(str(path)), skip_rows=skip, schema={"line": pl.String}, **options)
    lines = table["line"].str.strip_chars_end().str.strip_prefix("\ufeff")
    return lines.filter(lines.is_not_null() & (lines != ""))


def _read_scp(path: Path) -> pl.DataFrame:
    table = _split(path, r"^(?P<fileid>\S+)\s+(?P<path>.+)$", "`name path`")
    if (commands := table["path"].str.ends_with("|")).any():
        row = int(commands.arg_max() or 0)
        raise InputError(f"{path}: row {row + 1} is a command, and commands are not run: write its output to a file.")
    return table


def _read_segments(path: Path) -> pl.DataFrame:
    pattern = r"^(?P<fileid>\S+)\s+(?P<recording>\S+)\s+(?P<start>[-+.\deE]+)\s+(?P<end>[-+.\deE]+)$"
    table = _split(path, pattern, "`name recording start end`, in seconds")
    recordings = path.with_name("wav.scp")
    check_file(recordings)
    places = _read_scp(recordings).rename({"fileid": "recording"}).unique("recording", keep="first")
    table = table.join(places, on="recording", how="left", maintain_order="left")
    if missing := table.filter(pl.col("path").is_null())["recording"].unique(maintain_order=True).to_list():
        raise InputError(f"{path}: {recordings} lacks {len(missing):,} recordings: {some(missing, 3)}.")
    ends = table["end"].cast(pl.Float64, strict=False)
    return table.drop("recording").with_columns(end=pl.when(ends < 0).then(None).otherwise(ends))  # -1: to the end


def _read_fairseq(path: Path) -> pl.DataFrame:
    with path.open(encoding="utf-8-sig") as file:
        root = file.readline(HEAD).strip("\r\n")
    if not root or "\t" in root:
        raise InputError(f"{path}: row 1 must be the root folder of the recordings; found {_cut(root)}.")
    table = _split(path, rf"^(?P<fileid>[^\t]+)\t(?P<num_samples>{_COUNT})$", "`relative/path<TAB>num_samples`", skip=1)
    relative = pl.col("fileid")
    whole = pl.when(relative.str.starts_with("/")).then(relative).otherwise(pl.lit(root.rstrip("/") + "/") + relative)
    return table.with_columns(path=whole)


def _split(path: Path, pattern: str, form: str, skip: int = 0) -> pl.DataFrame:
    """Turn the named groups of a pattern into columns."""
    lines = _lines(path, skip)
    table = lines.str.extract_groups(pattern).struct.unnest()
    if (bad := table.to_series(0).is_null()).any():
        row = int(bad.arg_max() or 0)
        raise InputError(f"{path}: row {row + 1 + skip} must be {form}; found {_cut(lines[row])}.")
    return table


# --------------------------------------------------------------------------------------------------------------------
# All formats


def _typed(path: Path, manifest: pl.DataFrame, *, needs_audio: bool) -> pl.DataFrame:
    """Check and convert the columns that we know; put the others after them."""
    columns = manifest.columns
    is_named = "fileid" in columns and not {"path", "archive"} & set(columns)
    needed = ["num_samples"] if is_named and not needs_audio else ["path"]
    if missing := [column for column in [*needed, *(ARCHIVE if "archive" in columns else ())] if column not in columns]:
        found = ", ".join(columns) or "none"
        raise InputError(f"{path}: column {missing[0]!r} is missing. Columns found: {found}.", guide=GUIDE)
    optional = {*SPAN, *STATISTICS} | ({"num_samples"} if not SPAN.keys().isdisjoint(columns) else set())
    typed = {}
    for column, kind in SCHEMA.items():
        if column not in columns:
            continue
        if manifest[column].dtype.is_nested():
            found = _cut(manifest[column].head(1).to_list()[0])
            raise InputError(f"{path}: column {column!r}: found {found}, expected {_expected(column)}.")
        values = text = manifest[column].cast(pl.String)
        bad = text.is_null() & (column not in optional)
        if column in ARCHIVE:
            bad &= manifest["archive"].is_not_null() if "archive" in columns else False
        if kind is pl.String:
            bad |= text.str.contains("\0", literal=True).fill_null(value=False)
        else:
            values = text.str.strip_chars().cast(pl.Float64, strict=False)
            wrong = ~values.is_finite() | (values < (-1e308 if column == "mean" else 0))
            if kind is pl.Int64:
                wrong |= (values != values.floor()) | (values >= 2**53)
            bad |= text.is_not_null() & wrong.fill_null(value=True)
        if bad.any():
            row = int(bad.arg_max() or 0)
            found = "nothing" if text[row] is None else _cut(text[row])
            raise InputError(f"{path}: row {row + 1}, column {column!r}: found {found}, expected {_expected(column)}.")
        typed[column] = values.cast(kind)
    if "start" in typed and "end" in typed:
        empty = (typed["start"].fill_null(0.0) >= typed["end"]).fill_null(value=False)
        if empty.any():
            raise InputError(f"{path}: row {int(empty.arg_max() or 0) + 1}: the span ends before it begins.")
    return pl.DataFrame(typed | {name: manifest[name] for name in columns if name not in SCHEMA})


def _expected(column: str) -> str:
    if column in SPAN:
        return "seconds, at least 0"
    return {pl.String: "a string", pl.Int64: "an integer of at least 0", pl.Float64: "a number"}[SCHEMA[column]]


def _cut(value: Any) -> str:
    return repr(value)[:200]


def stem(path: pl.Expr) -> pl.Expr:
    """File names without folders and extensions."""
    name = path.str.split("/").list.last()
    return pl.when(name.str.contains(r"(?s)^.+\.")).then(name.str.replace(r"\.[^.]*$", "")).otherwise(name)


def _named(manifest: pl.DataFrame) -> pl.DataFrame:
    """Add ``fileid`` if it is missing, and take lengths from spans."""
    if "fileid" not in manifest.columns:
        manifest = manifest.select(stem(pl.col("path")).alias("fileid"), pl.all())
    if SPAN.keys().isdisjoint(manifest.columns):
        return manifest
    absent = [pl.lit(None).alias(name) for name in (*SPAN, "num_samples") if name not in manifest.columns]
    start, end = pl.col("start").fill_null(0.0), pl.col("end")
    length = (end * SAMPLE_RATE).round() - (start * SAMPLE_RATE).round()
    known = pl.when(end.is_not_null()).then(length).when(start == 0).then("num_samples").cast(pl.Int64)
    lengths = manifest.with_columns(absent).select(num_samples=known)["num_samples"]
    # Without an end, only the recording has the length of the span.
    manifest = manifest.drop("num_samples", strict=False)
    return manifest if lengths.null_count() else manifest.with_columns(lengths)


def _located(manifest: pl.DataFrame, source: Path) -> pl.DataFrame:
    """Resolve relative paths: from the current folder, otherwise from the manifest's."""

    @cache
    def roots(parent: str) -> list[str]:
        both = dict.fromkeys(["", str(source.parent)])
        return [root for root in both if os.path.isdir(os.path.join(root, parent) or ".")]  # noqa: PTH112, PTH118

    def locate(path: str) -> str:
        if path.startswith("~") or "$" in path:
            try:
                path = str(expand(path))
            except InputError as error:
                raise InputError(f"{source}: {error}") from None
        found = roots(os.path.dirname(path))  # noqa: PTH120
        if len(found) > 1:
            found = [root for root in found if os.path.exists(os.path.join(root, path))]  # noqa: PTH110, PTH118
        return os.path.join(found[0], path) if found else path  # noqa: PTH118

    for column in {"path", "archive"}.intersection(manifest.columns):
        is_open = ~pl.col(column).str.contains(r"^(/[^$]*)?$")
        if column == "path" and "archive" in manifest.columns:
            is_open &= pl.col("archive").is_null()
        if (rows := manifest.select(is_open.fill_null(value=False).arg_true()).to_series()).len():
            located = [locate(path) for path in manifest[column].gather(rows)]
            manifest = manifest.with_columns(manifest[column].scatter(rows, located))
    return manifest

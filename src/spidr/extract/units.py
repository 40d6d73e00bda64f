"""Units of recordings in one table: JSON lines, Parquet, or another program's format.

Every process adds lines to a file in its job's folder. At the end they become the table: first its existing rows of
other recordings, then those of the sources in order.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from spidr.environment import Environment
from spidr.extract.formats import FORMATS, Row, UnitFormat, output_file
from spidr.extract.job import extract
from spidr.extract.kmeans import KMeans
from spidr.extract.options import Options, check_choice
from spidr.extract.outputs import Output
from spidr.extract.session import Session, Skipped
from spidr.extract.sources import Item
from spidr.models import DinoSR
from spidr.models.hub import check_name
from spidr.tools.errors import InputError, first_line
from spidr.tools.files import atomic_write, expand, writing

SCHEMA: dict[str, Any] = {"fileid": pl.String, "units": pl.List(pl.Int32), "durations": pl.List(pl.Int32)}
ORDER, CHECKSUM = "recordings", "crc32"
"""Keys in the record of a table whose rows have no names: their names, and the CRC-32 of the table."""


def extract_units(
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    model: str | Path | DinoSR = "spidr_base",
    layer: int | None = None,
    dedup: bool = False,
    kmeans: str | Path | None = None,
    smooth: float = 0.0,
    file_format: UnitFormat = "spidr",
    language: str | None = None,
    split: str | None = None,
    options: Options | None = None,
) -> Skipped:
    """Write the units of recordings, one row ``{"fileid": …, "units": […]}`` each, 50 units per second.

    Called again, it resumes where it stopped; processes started by torchrun or SLURM share the work, and several jobs
    may add different recordings to one table at the same time.

    Args:
        sources: Manifests, lists, folders of recordings, audio files.
        output: A ``.jsonl`` or ``.parquet`` file; its rows of other recordings are kept. ``OUTPUT.json`` (in a Parquet
            file, also the metadata "spidr") says how it was made, ``OUTPUT.recordings.json`` from which recordings.
        model: A published model's name, a checkpoint, or a model.
        layer: One that has a codebook, counted from 1; None: the model's best, or that of ``kmeans``.
        dedup: Merge repeated units and add ``durations``, the number of frames of each.
        kmeans: Take the nearest centroid of this file (see :func:`spidr.extract.fit_kmeans`) instead of the codebook.
        smooth: Cost of each change of unit, in log-probability (with ``kmeans``, in squared distance), which gives the
            best sequence of units, with fewer and longer runs, instead of each frame's best unit. 0: no cost.
        file_format: "spidr", or another program's format: "discophon", "slamkit", "unit-hifigan", "fairseq" (GSLM) or
            "km".
        language: With the format "discophon", ``output`` may be a folder for ``units-LANGUAGE-SPLIT.jsonl``.
        split: The other part of that name.
        options: How recordings are encoded.

    Returns:
        The recordings that were skipped, of all processes.

    Raises:
        InputError: The input or model is wrong, the output was made with other settings or has another recording
            of the same name, or a recording cannot be encoded, without ``on_error="skip"``.
    """
    chosen = options or Options()
    check_choice("file_format", file_format, UnitFormat)
    path = output_file(expand(output), file_format, language, split)
    if not 0 <= smooth <= 1e6:
        raise InputError(f"smooth: found {smooth}, expected a number of 0 or more")
    if dedup and file_format in ("discophon", "unit-hifigan"):
        raise InputError(f"dedup: {file_format} needs one unit for each frame; leave it out")
    check_name(model)
    clusters = None if kmeans is None else KMeans.load(expand(kmeans))
    made = {"kind": "units", "dedup": dedup, "kmeans": None if clusters is None else clusters.fingerprint}
    table = _Table(path, file_format, made | ({} if file_format == "spidr" else {"format": file_format}))

    def make_session(env: Environment) -> Session:
        if clusters is None:
            return Session(model, layer, chosen, env, discrete=True, penalty=smooth)
        number = clusters.made["layer"] if layer is None else layer
        session = Session(model, number, chosen, env, discrete=True, centroids=clusters.centroids, penalty=smooth)
        clusters.check(session)
        return session

    return extract(sources, table, chosen, make_session, "Units")


class _Place(NamedTuple):
    """Location of a row: file, whether that is the table, first byte, number of bytes."""

    path: Path
    is_final: bool
    start: int
    size: int


class _Table(Output):
    """A table of units.

    Jobs' files hold the unit of every frame, as JSON; only the table has the requested format. If its rows have no
    names, the record has them.
    """

    def __init__(self, path: Path, file_format: UnitFormat, settings: dict[str, Any]) -> None:
        beside = (path.with_name(f"{path.name}.{ending}") for ending in ("json", "recordings.json", "unfinished"))
        super().__init__(path, list(beside), settings)
        self.format, self.merge = FORMATS[file_format], bool(settings["dedup"])
        self.is_parquet = path.suffix == ".parquet"
        self.num_units = 0

    def has_values(self) -> bool:
        return os.path.exists(self.path)  # noqa: PTH110 (False for a name too long, which writing complains about)

    def check_new(self) -> None:
        if self.has_values():
            raise InputError(f"{self.path}: exists, and no {self.record.name} says how it was made. Remove it.")

    def find(self, items: Sequence[Item], session: Session, folders: Sequence[Path]) -> int:
        if self.is_parquet:
            _check_utf8(items)
        self.num_units = int(session.settings()["num_units"])
        exact = not session.options.resample
        frames = {item.name: session.num_frames(item.num_samples) for item in items if item.num_samples and exact}
        rows, damaged = self._rows(folders, frames)
        self.done = set(rows)
        if not self.format.has_names and (others := self.done - {item.name for item in items}):
            raise InputError(
                f"{self.path}: its rows have no names, so it cannot hold other recordings beside these; it has "
                f"{len(others)}. Choose another output."
            )
        return damaged

    @contextmanager
    def writing(self, folder: Path, rank: int) -> Iterator[None]:
        path = folder / f"{rank}.jsonl"
        with writing(path):
            self._file = path.open("xb")
        try:
            yield
        finally:
            with writing(path):
                self._file.close()  # retries what could not be written

    def write(self, item: Item, pieces: Iterable[NDArray[Any]]) -> None:
        row = Row(item.name, np.concatenate(list(pieces)).tolist(), str(item.recording), item.speaker)
        with writing(self._file.name):
            self._file.write(json.dumps(asdict(row)).encode() + b"\n")
            self._file.flush()

    def finish(self, items: Sequence[Item], skipped: dict[str, str], folders: Sequence[Path]) -> None:
        """Write the table: its rows of other recordings, then those of ``items`` in order."""
        rows, _ = self._rows(folders, {})
        ours = dict.fromkeys(item.name for item in items if not (self.format.has_names and item.name in skipped))
        names = [*(name for name in rows if name not in ours and self.format.has_names), *ours]
        merged = folders[0] / "merged" if self.is_parquet else self.path
        checksum = 0
        with atomic_write(merged) as file:
            for name in names:
                line = self._line(rows.get(name))
                checksum = zlib.crc32(line, checksum)
                file.write(line)
        if not self.format.has_names:
            self.settings |= {ORDER: names, CHECKSUM: checksum}
        if self.is_parquet:
            with atomic_write(self.path) as file:
                table = pl.read_ndjson(escape(str(merged)), schema=self._schema())
                table.write_parquet(file, metadata={"spidr": json.dumps(self.settings)})
        super().finish(items, skipped, folders)

    def _line(self, place: _Place | None) -> bytes:
        """Make a row of the table; a skipped recording has an empty one."""
        if place is None:
            return b"\n"
        with place.path.open("rb") as file:
            file.seek(place.start)
            line = file.read(place.size)
        return line if place.is_final else self.format.line(Row(**json.loads(line)), self.merge).encode() + b"\n"

    def _rows(self, folders: Sequence[Path], frames: Mapping[str, int]) -> tuple[dict[str, _Place], int]:
        """Find the row of each recording, and count damaged rows."""
        rows: dict[str, _Place] = {}
        damaged = 0
        for path in (path for folder in folders for path in sorted(folder.glob("[0-9]*.jsonl"))):
            for line, start in _lines(path):
                try:
                    row = Row(**json.loads(line))
                    self._check(row.units, None, frames.get(row.name))
                    rows[row.name] = _Place(path, False, start, len(line))
                except (ValueError, TypeError):
                    damaged += line.endswith(b"\n")  # a killed process may have left half of the last one
        table = self._table(folders[0])
        names = [] if self.format.has_names else self._order()
        for number, (line, start) in enumerate(_lines(table)):
            try:
                name, units, durations = self.format.parse(line.decode())
                name = name if name is not None else names[number]
                if units or self.format.has_names:
                    self._check(units, durations, None if self.merge and durations is None else frames.get(name))
                    rows[name] = _Place(table, True, start, len(line))
            except (ValueError, TypeError, KeyError, IndexError, AttributeError):
                damaged += 1
        return rows, damaged

    def _check(self, units: Any, durations: Any, frames: int | None) -> None:
        """Check that a row has a unit for each of the recording's frames, give or take one."""
        if not units or set(map(type, units)) != {int} or not 0 <= min(units) <= max(units) < self.num_units:
            raise ValueError
        if durations is not None and (set(map(type, durations)) != {int} or len(durations) != len(units)):
            raise ValueError
        total = len(units) if durations is None else sum(durations)
        if frames is not None and abs(total - frames) > 1:
            raise ValueError

    def _order(self) -> list[str]:
        """Names of the rows, if the record belongs to this table."""
        if not os.path.exists(self.record):  # noqa: PTH110
            return []
        record = json.loads(self.record.read_text(encoding="utf-8"))
        checksum = 0
        for line, _ in _lines(self.path):
            checksum = zlib.crc32(line, checksum)
        return record.get(ORDER, []) if record.get(CHECKSUM) == checksum else []

    def _table(self, folder: Path) -> Path:
        """The existing table as lines."""
        if not self.is_parquet or not self.has_values():
            return self.path
        try:
            table = pl.read_parquet(escape(str(self.path))).select(list(self._schema()))
        except (OSError, ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise InputError(f"{self.path}: cannot be read ({first_line(error)}). Remove it.") from None
        with atomic_write(folder / "table") as file:
            table.write_ndjson(file)
        return folder / "table"

    def _schema(self) -> dict[str, Any]:
        return {name: SCHEMA[name] for name in ("fileid", "units", *(["durations"] if self.merge else []))}


def _check_utf8(items: Sequence[Item]) -> None:
    """Check that all names are UTF-8, as Parquet requires."""
    for item in items:
        try:
            item.name.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{str(item.recording)!a}: the name is not UTF-8, which Parquet cannot hold. Rename the file, or "
                "choose an output that ends in .jsonl."
            ) from None


def _lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Lines of a file, and the position of each; none if there is no file."""
    if not os.path.exists(path):  # noqa: PTH110
        return
    position = 0
    with path.open("rb") as file:
        for line in file:
            yield line, position
            position += len(line)

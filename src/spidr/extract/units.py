"""Units of recordings, all in one table: JSON lines or Parquet.

While the work goes on, every process adds lines to a file of its own in ``OUTPUT.unfinished``. At the end they become
the table: first the rows of other recordings that it had before, then those of the sources in their order.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from glob import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import polars as pl
from torch import Tensor

from spidr.environment import environment
from spidr.extract.encoder import Encoder, Options, Skipped
from spidr.extract.kmeans import KMeans
from spidr.extract.outputs import (
    check_record,
    check_recordings,
    gather_skipped,
    names_of,
    place_of,
    record,
    report,
    write_record,
)
from spidr.extract.sources import Item, find_items
from spidr.models import DinoSR
from spidr.models.hub import check_name
from spidr.tools.errors import InputError, first_line
from spidr.tools.files import atomic_write, make_folder

BEGINNING = '{"fileid": '
SCHEMA: dict[str, Any] = {"fileid": pl.String, "units": pl.List(pl.Int32), "durations": pl.List(pl.Int32)}


def extract_units(
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    model: str | Path | DinoSR = "spidr_base",
    layer: int | None = None,
    dedup: bool = False,
    kmeans: str | Path | None = None,
    options: Options | None = None,
) -> Skipped:
    """Write the units of recordings, one row ``{"fileid": …, "units": […]}`` for each, 50 units a second.

    Started again, it goes on where it has stopped; processes started by torchrun or SLURM share the work.

    Args:
        sources: Manifests, folders of recordings, audio files.
        output: A ``.jsonl`` or ``.parquet`` file; rows of other recordings in it are kept. How it was made is in
            ``OUTPUT.json``, and under "spidr" in the metadata of a Parquet file; of which recordings, in
            ``OUTPUT.recordings.json``.
        model: A published model's name, a checkpoint, or a model.
        layer: One that has a codebook, counted from 1; None: the model's best, or that of ``kmeans``.
        dedup: Merge repeated units and add ``durations``, the number of frames of each.
        kmeans: Take the nearest centroid of this file (see :func:`spidr.extract.fit_kmeans`) instead of the codebook.
        options: How recordings are encoded.

    Returns:
        The recordings that were skipped, of all processes.

    Raises:
        InputError: The input or model is wrong, the output was made with other settings or has another recording
            of the same name, or a recording cannot be encoded, without ``on_error="skip"``.
    """
    options, output = options or Options(), Path(output)
    if output.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"{output}: the name of a table of units must end in .jsonl or .parquet.")
    skip = options.on_error == "skip"
    check_name(model)
    with environment(options.run_config()) as env:
        clusters = None if kmeans is None else KMeans.load(kmeans)
        items = find_items(names_of(sources), tree=False, resample=options.resample, skip=skip)
        if output.suffix == ".parquet":
            _check_utf8(items)
        if clusters is not None and layer is None:
            layer = clusters.layer
        encoder = Encoder(model, layer, options, env, codebook=clusters is None)
        encode: Callable[[list[Tensor]], list[Tensor]] = encoder.units
        if clusters is not None:
            encode = clusters.on(encoder)
        content = record(
            "units",
            encoder.settings() | {"dedup": dedup, "kmeans": None if clusters is None else clusters.fingerprint},
        )
        table = _Table(output, content)
        batches = encoder.plan(items)
        pending: list[int] = []
        if env.is_main:
            done = table.prepare(items)
            pending = [i for i, batch in enumerate(batches) if any(item.name not in done for item in batch)]
        pending = env.broadcast_object(pending)
        skipped = Skipped()
        results = encoder.run([batches[i] for i in pending], encode, "Units")
        with closing(results), table.part(env.rank) as write:
            for encoded in results:
                rows = [(item.name, units.tolist()) for item, units, _ in encoded if units is not None]
                write(b"".join(_line(name, units, dedup=dedup) for name, units in rows))
                skipped.note(encoded)
        skipped = gather_skipped(env, skipped)
        if env.is_main:
            table.finish(items, skipped)
        report(skipped, len(items), env)
        return skipped


def _check_utf8(items: Sequence[Item]) -> None:
    """Check that all names are text, which is all that Parquet can hold."""
    for item in items:
        try:
            item.name.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{str(item.recording)!a}: the name is not UTF-8, which Parquet cannot hold. Rename the file, or "
                "choose an output that ends in .jsonl."
            ) from None


def _line(fileid: str, units: list[int], *, dedup: bool) -> bytes:
    row: dict[str, Any] = {"fileid": fileid, "units": units}
    if dedup:
        runs = [(unit, sum(1 for _ in run)) for unit, run in groupby(units)]
        row |= {"units": [unit for unit, _ in runs], "durations": [count for _, count in runs]}
    return _json(row)


def _json(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


class _Table:
    """The table of units, and what there is of it before it is complete."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content
        self.record = path.with_name(f"{path.name}.json")
        self.unfinished = path.with_name(f"{path.name}.unfinished")
        self.recordings = path.with_name(f"{path.name}.recordings.json")
        self.known: dict[str, str] = {}

    def prepare(self, items: Sequence[Item]) -> set[str]:
        """Check that what is there was made in the same way, and return the names of the rows there are."""
        exists = os.path.exists(self.path)  # noqa: PTH110 (False for a name too long, which writing complains about)
        if exists:
            if not os.path.exists(self.record):  # noqa: PTH110
                raise InputError(f"{self.path}: exists, and no {self.record.name} says how it was made. Remove it.")
            check_record(self.record, self.content)
        made = self.unfinished / "extract.json"
        if os.path.exists(made):  # noqa: PTH110
            check_record(made, self.content)
            done = set(self._rows())
            self.known = check_recordings(self.recordings, items, done)
            return done
        shutil.rmtree(self.unfinished, ignore_errors=True)  # killed while it was being removed
        table = self._read_parquet() if exists and self.path.suffix == ".parquet" else None
        done = set(self._rows() if table is None else table["fileid"])
        self.known = check_recordings(self.recordings, items, done)  # before anything else is written
        if table is not None:
            make_folder(self.unfinished)
            with atomic_write(self.unfinished / "0.jsonl") as file:
                file.writelines(_json(row) for row in table.iter_rows(named=True))
        write_record(made, self.content)
        return done

    @contextmanager
    def part(self, rank: int) -> Iterator[Callable[[bytes], None]]:
        """A function that adds rows to a file of this process.

        Raises:
            InputError: It cannot be written.
        """
        path = self.unfinished / f"{time.time_ns()}-{rank}.jsonl"
        with _writing(path):
            file = path.open("xb")

        def write(lines: bytes) -> None:
            with _writing(path):
                file.write(lines)
                file.flush()

        try:
            yield write
        finally:
            with _writing(path):
                file.close()  # writes once more what could not be written

    def finish(self, items: Sequence[Item], skipped: Skipped) -> None:
        """Write the table: what it has of other recordings, then the rows of ``items`` in that order."""
        rows = self._rows()
        encoded = [item for item in items if item.name not in skipped]
        present = {place_of(item) for item in encoded}  # also under another name, which a larger corpus may give them
        names = [name for name in rows if self.known.get(name) not in present]
        names += [item.name for item in encoded]
        write_record(self.record, self.content, skipped)  # first: a table without it would be refused
        merged = self.path if self.path.suffix == ".jsonl" else self.unfinished / "merged"
        with atomic_write(merged) as file:
            file.writelines(self._read(rows[name]) for name in names)
        if merged != self.path:
            metadata = {"spidr": json.dumps(self.content)}
            with atomic_write(self.path) as file:
                table = pl.read_ndjson(escape(str(merged)), schema=self._schema())
                table.write_parquet(file, metadata=metadata)
        shutil.rmtree(self.unfinished)

    def _schema(self) -> dict[str, Any]:
        return {name: SCHEMA[name] for name in ("fileid", "units", *(["durations"] if self.content["dedup"] else []))}

    def _read_parquet(self) -> pl.DataFrame:
        try:
            return pl.read_parquet(escape(str(self.path))).select(list(self._schema()))
        except (OSError, ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise InputError(f"{self.path}: cannot be read ({first_line(error)}). Remove it.") from None

    def _rows(self) -> dict[str, tuple[Path, int, int]]:
        """Where the row of each recording is: file, first byte, number of bytes."""
        rows = {}
        paths = sorted(self.unfinished.glob("*.jsonl"))
        if self.path.suffix == ".jsonl" and os.path.exists(self.path):  # noqa: PTH110
            paths.append(self.path)
        for path in paths:
            for name, start, size in _scan(path):
                rows[name] = (path, start, size)
        return rows

    def _read(self, place: tuple[Path, int, int]) -> bytes:
        path, start, size = place
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}). What was done before is intact: make room, then "
            "run the same command again."
        ) from error


def _scan(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and number of bytes of each complete row; a killed process may have left half of one."""
    decoder, position = json.JSONDecoder(), 0
    with path.open("rb") as file:
        for line in file:
            text = line.decode(errors="replace")
            if text.endswith("]}\n") and text.startswith(BEGINNING):
                name, _ = decoder.raw_decode(text, len(BEGINNING))
                yield name, position, len(line)
            position += len(line)

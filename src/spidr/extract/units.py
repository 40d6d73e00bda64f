"""Units of recordings, all in one table: JSON lines or Parquet.

While the work goes on, every process adds lines to a file of its own in ``OUTPUT.unfinished``. At the end they become
the table, in the order of the sources.

May import ``spidr.config``, ``spidr.environment``, ``spidr.models``, ``spidr.tools`` and its siblings.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import polars as pl
from torch import Tensor

from spidr.config import InputError
from spidr.environment import environment
from spidr.extract.encoder import Encoder, Options, Skipped
from spidr.extract.kmeans import KMeans
from spidr.extract.outputs import check_record, gather_skipped, names_of, record, report, write_record
from spidr.extract.sources import find_items
from spidr.models import DinoSR
from spidr.models.hub import check_name
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
        output: A ``.jsonl`` or ``.parquet`` file. How it was made is in ``OUTPUT.json``, and under "spidr" in the
            metadata of a Parquet file.
        model: A published model's name, a checkpoint, or a model.
        layer: One that has a codebook, counted from 1; None: the model's best, or that of ``kmeans``.
        dedup: Merge repeated units and add ``durations``, the number of frames of each.
        kmeans: Take the nearest centroid of this file (see :func:`spidr.extract.fit_kmeans`) instead of the codebook.
        options: How recordings are encoded.

    Returns:
        The recordings that were skipped, of all processes.

    Raises:
        InputError: The input or model is wrong, the output was made with other settings, or a recording cannot be
            encoded, without ``on_error="skip"``.
    """
    options, output = options or Options(), Path(output)
    if output.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"{output}: the name of a table of units must end in .jsonl or .parquet.")
    skip = options.on_error == "skip"
    check_name(model)
    with environment(options.run_config()) as env:
        clusters = None if kmeans is None else KMeans.load(kmeans)
        items = find_items(names_of(sources), tree=False, resample=options.resample, skip=skip)
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
            done = table.prepare()
            pending = [i for i, batch in enumerate(batches) if any(item.name not in done for item in batch)]
        pending = env.broadcast_object(pending)
        skipped = Skipped()
        results = encoder.run([batches[i] for i in pending], encode, "Units")
        with closing(results), table.part(env.rank) as part:
            for encoded in results:
                for item, units, _ in encoded:
                    if units is not None:
                        part.write(_line(item.name, units.tolist(), dedup=dedup))
                part.flush()
                skipped.note(encoded)
        skipped = gather_skipped(env, skipped)
        if env.is_main:
            table.finish([item.name for item in items if item.name not in skipped], skipped)
        report(skipped, len(items), env)
        return skipped


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

    def prepare(self) -> set[str]:
        """Check that what is there was made in the same way, and return the names of the rows there are."""
        if os.path.exists(self.path):  # noqa: PTH110 (False for a name that is too long, which writing complains about)
            if not self.record.exists():
                raise InputError(f"{self.path}: exists, and no {self.record.name} says how it was made. Remove it.")
            check_record(self.record, self.content)
        made = self.unfinished / "extract.json"
        if os.path.exists(made):  # noqa: PTH110
            check_record(made, self.content)
        else:
            shutil.rmtree(self.unfinished, ignore_errors=True)  # killed while it was being removed
            if self.path.suffix == ".parquet" and os.path.exists(self.path):  # noqa: PTH110
                make_folder(self.unfinished)
                with atomic_write(self.unfinished / "0.jsonl") as file:
                    file.writelines(_json(row) for row in pl.read_parquet(self.path).iter_rows(named=True))
            write_record(made, self.content)
        return set(self._rows())

    def part(self, rank: int) -> IO[bytes]:
        """A file for the rows of a process."""
        return (self.unfinished / f"{time.time_ns()}-{rank}.jsonl").open("xb")

    def finish(self, names: list[str], skipped: Skipped) -> None:
        """Write the table, with the rows of ``names`` in that order."""
        rows = self._rows()
        write_record(self.record, self.content, skipped)  # first: a table without it would be refused
        merged = self.path if self.path.suffix == ".jsonl" else self.unfinished / "merged"
        with atomic_write(merged) as file:
            file.writelines(self._read(rows[name]) for name in names)
        if merged != self.path:
            columns = {
                name: SCHEMA[name] for name in ("fileid", "units", *(["durations"] if self.content["dedup"] else []))
            }
            metadata = {"spidr": json.dumps(self.content)}
            with atomic_write(self.path) as file:
                pl.read_ndjson(merged, schema=columns).write_parquet(file, metadata=metadata)
        shutil.rmtree(self.unfinished)

    def _rows(self) -> dict[str, tuple[Path, int, int]]:
        """Where the row of each recording is: file, first byte, number of bytes."""
        rows = {}
        paths = sorted(self.unfinished.glob("*.jsonl"))
        if self.path.suffix == ".jsonl" and self.path.exists():
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

"""Something about each of many recordings, several at once."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import polars as pl
from tqdm import tqdm

from spidr.data.audio import num_samples
from spidr.data.manifest import iter_recordings
from spidr.tools.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

R = TypeVar("R")
T = TypeVar("T")

CHUNK = 256
"""Recordings per task of a thread."""

LISTED = 20
"""Problems that a message lists at most."""


def measure(
    function: Callable[[R], T],
    recordings: Iterable[R],
    *,
    total: int | None = None,
    progress: bool = True,
    description: str = "Manifest",
) -> Iterator[T | InputError]:
    """Yield ``function(recording)`` for each recording in order, or the :class:`InputError` that it raised.

    Args:
        function: Such as :func:`spidr.data.num_samples`.
        recordings: The recordings or what describes them, read as they are needed.
        total: How many there are, if known.
        progress: Show a progress bar on a terminal.
        description: What it says.
    """

    def of(recording: R) -> T | InputError:
        try:
            return function(recording)
        except InputError as error:
            return error

    threads = min(32, (os.cpu_count() or 1) + 4)
    iterator = iter(recordings)
    pending: deque[Future[list[T | InputError]]] = deque()
    pool = ThreadPoolExecutor(threads)
    with tqdm(total=total, desc=description, unit="file", disable=None if progress else True) as bar:
        try:
            while True:
                chunk = list(islice(iterator, CHUNK))
                if chunk:
                    pending.append(pool.submit(lambda chunk: list(map(of, chunk)), chunk))
                # Never far ahead of the results: after an error, little remains to be waited for.
                while pending and (not chunk or len(pending) > 2 * threads):
                    results = pending.popleft().result()
                    bar.update(len(results))
                    yield from results
                if not chunk:
                    return
        finally:
            pool.shutdown(cancel_futures=True)


def problems_of(errors: list[InputError], total: int, remedy: str) -> InputError:
    """One error for the problems of many recordings, with what can be done about them at the end."""
    lines = [str(error) for error in errors[:LISTED]]
    if len(errors) > LISTED:
        lines.append(f"… and {len(errors) - LISTED:,} more")
    end = f"{len(errors):,} of {total:,} recordings cannot be read{remedy and '; '}{remedy}."
    return InputError("\n  ".join(lines) + f"\n{end}")


def with_lengths(manifest: pl.DataFrame, name: str) -> pl.DataFrame:
    """A manifest with ``num_samples``, from the recordings' headers if it has none.

    Raises:
        InputError: A recording cannot be read; all of them are named.
    """
    if "num_samples" in manifest.columns:
        return manifest
    found = list(measure(num_samples, iter_recordings(manifest), total=manifest.height, description="Lengths"))
    if errors := [error for error in found if isinstance(error, InputError)]:
        remedy = f"`python -m spidr.data.write_manifest {name} OUT.csv --on-error skip` leaves them out"
        raise problems_of(errors, manifest.height, remedy)
    return manifest.with_columns(pl.Series("num_samples", found, dtype=pl.Int64))

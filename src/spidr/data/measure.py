"""Measure many recordings in parallel."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import polars as pl
from tqdm import tqdm

from spidr.data.audio import num_samples
from spidr.data.manifest import iter_recordings
from spidr.tools.errors import InputError, some

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

R = TypeVar("R")
T = TypeVar("T")

PER_TASK = 64
"""Recordings per task of a thread."""

LISTED = 20
"""Most problems that a message lists."""


def measure(
    function: Callable[[R], T],
    recordings: Iterable[R],
    *,
    total: int,
    progress: bool = True,
    description: str = "Manifest",
) -> Iterator[T | InputError]:
    """Yield ``function(recording)`` for each recording in order, or the :class:`InputError` that it raised.

    Args:
        function: Such as :func:`spidr.data.num_samples`; called in several threads.
        recordings: The recordings or what describes them, taken as they are needed.
        total: How many there are.
        progress: Show a progress bar on a terminal.
        description: What the bar says.
    """

    def of(recording: R) -> T | InputError:
        try:
            return function(recording)
        except InputError as error:
            return error

    def of_all(recordings: list[R]) -> list[T | InputError]:
        return [of(recording) for recording in recordings]

    remaining, threads = iter(recordings), min(32, (os.cpu_count() or 1) + 4)
    pool = ThreadPoolExecutor(threads)
    try:
        with tqdm(total=total, desc=description, unit="file", disable=None if progress else True) as bar:
            while tasks := [task for _ in range(4 * threads) if (task := list(islice(remaining, PER_TASK)))]:
                for results in pool.map(of_all, tasks):
                    bar.update(len(results))
                    yield from results
    finally:
        pool.shutdown(cancel_futures=True)


def problems_of(errors: list[InputError], total: int, remedy: str) -> InputError:
    """Make one error of the problems of many recordings, ending with the remedy."""
    shown = some(errors, LISTED, "\n  ")
    return InputError(f"{shown}\n{len(errors):,} of {total:,} recordings cannot be read{remedy and '; '}{remedy}.")


def with_lengths(manifest: pl.DataFrame, name: str) -> pl.DataFrame:
    """Add ``num_samples`` to a manifest that lacks it, from the recordings' headers.

    Raises:
        InputError: Recordings cannot be read; all of them are named.
    """
    if "num_samples" in manifest.columns:
        return manifest
    found = list(measure(num_samples, iter_recordings(manifest), total=manifest.height, description="Lengths"))
    if errors := [error for error in found if isinstance(error, InputError)]:
        remedy = f"`python -m spidr.data.write_manifest {name} OUT.csv --on-error skip` leaves them out"
        raise problems_of(errors, manifest.height, remedy)
    return manifest.with_columns(pl.Series("num_samples", found, dtype=pl.Int64))

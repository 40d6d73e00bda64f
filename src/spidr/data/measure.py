"""Measure many recordings in parallel."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

import polars as pl
from tqdm import tqdm

from spidr.data.audio import num_samples
from spidr.data.manifest import iter_recordings
from spidr.tools.errors import InputError, some

R = TypeVar("R")
T = TypeVar("T")


def measure(
    function: Callable[[R], T],
    recordings: Iterable[R],
    *,
    total: int,
    progress: bool = True,
    description: str = "Manifest",
) -> Iterator[T | InputError]:
    """Yield ``function(recording)`` for each recording in order, or the :class:`InputError` that it raised.

    The function is called in several threads. ``recordings``, or their descriptions, are consumed as needed.
    """

    def of(recording: R) -> T | InputError:
        try:
            return function(recording)
        except InputError as error:
            return error

    def of_all(part: list[R]) -> list[T | InputError]:
        return list(map(of, part))

    remaining = iter(recordings)
    with (
        ThreadPoolExecutor(min(32, (os.cpu_count() or 1) + 4)) as pool,
        tqdm(total=total, desc=description, unit="file", disable=None if progress else True) as bar,
    ):
        # Many at a time: to wait for each result on its own would take longer than to read a header.
        while parts := [part for _ in range(1024) if (part := list(islice(remaining, 16)))]:
            for result in chain.from_iterable(pool.map(of_all, parts)):
                bar.update()
                yield result


def problems_of(errors: list[InputError], total: int, remedy: str) -> InputError:
    """Combine the errors of many recordings into one that ends with the remedy."""
    shown = some(errors, 20, "\n  ")
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

"""Measure many recordings in parallel."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
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

    The function is called in several threads. ``recordings``, or what describes them, are taken as they are needed.
    """

    def of(recording: R) -> T | InputError:
        try:
            return function(recording)
        except InputError as error:
            return error

    def of_all(part: list[R]) -> list[T | InputError]:
        return list(map(of, part))

    remaining = iter(recordings)
    parts, workers = iter(lambda: list(islice(remaining, 16)), []), min(32, (os.cpu_count() or 1) + 4)
    with (
        closing(ahead(of_all, parts, workers=workers, depth=1024)) as results,
        tqdm(total=total, desc=description, unit="file", disable=None if progress else True) as bar,
    ):
        for result in chain.from_iterable(results):
            bar.update()
            yield result


def ahead(
    function: Callable[[R], T],
    items: Iterable[R],
    *,
    workers: int,
    depth: int,
    initializer: Callable[[], None] | None = None,
) -> Generator[T]:
    """``map(function, items)`` on threads, in order, at most ``depth`` results ahead."""
    pool = ThreadPoolExecutor(workers, initializer=initializer)
    pending: deque[Future[T]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def problems_of(errors: list[InputError], total: int, remedy: str) -> InputError:
    """Make one error of the problems of many recordings, ending with the remedy."""
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

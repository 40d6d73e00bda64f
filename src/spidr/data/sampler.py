"""Form batches of recordings: a pure function of seed and epoch, on arrays only."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spidr.config import DataConfig
from spidr.data.seeds import Draw, generator
from spidr.tools.errors import InputError

Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class BatchList:
    """Batches of rows, with constant-time ``batches[n]``."""

    rows: Integers  # rows of the manifest, batch by batch
    bounds: Integers  # batch b is rows[bounds[b]:bounds[b + 1]]
    order: Integers  # item n of the list is batch order[n]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, n: int) -> Integers:
        batch = self.order[n]
        return self.rows[self.bounds[batch] : self.bounds[batch + 1]]


class BatchSampler:
    """The batches of every epoch, of recordings of these lengths.

    Recordings shorter than ``min_sample_size`` or ``shortest`` are skipped; longer ones count as ``max_sample_size``.
    They are sorted by length into buckets and shuffled within; batches are filled bucket by bucket, up to
    ``max_batch_length`` samples, and shuffled. ``sources``, the number of each recording's manifest, are for
    ``cfg.weights``.

    An epoch consists of whole rounds of ``round_size`` batches, which one optimizer step takes over all processes,
    ``accumulation`` on each. The last round is completed with the epoch's first batches or, with ``drop_last``,
    dropped. Otherwise the list is the same for any number of processes.
    """

    def __init__(
        self,
        lengths: Integers,
        cfg: DataConfig,
        *,
        shortest: int = 1,
        world_size: int = 1,
        accumulation: int = 1,
        sources: Integers | None = None,
    ) -> None:
        self.cfg, self.world_size, self.round_size = cfg, world_size, world_size * accumulation
        self._rows, self._lengths = usable_rows(lengths, cfg, shortest)
        self._times = None if cfg.weights is None or sources is None else self._shares(sources[self._rows], cfg.weights)
        boundaries = bucket_boundaries(self._lengths, cfg)
        # The smallest type that fits: numpy sorts 16-bit integers in linear time.
        dtype = np.uint16 if len(boundaries) < 2**16 else np.uint32
        self._buckets = np.searchsorted(boundaries, self._lengths).astype(dtype)

    def epoch(self, epoch: int) -> BatchList:
        """The batches of an epoch: for process r of w, batches ``r, r + w, r + 2 w, …``.

        Raises:
            InputError: There are fewer batches than processes, or than a round has with ``drop_last``.
        """
        rng = generator(self.cfg.random_seed, Draw.ORDER, epoch)
        chosen = np.arange(len(self._rows), dtype=self._rows.dtype)
        if self._times is not None:  # the integer part, plus one with the probability of the fraction
            chosen = np.repeat(chosen, (self._times + rng.random(len(chosen))).astype(np.int64))
        shuffled = rng.permutation(chosen)
        shuffled = shuffled[np.argsort(self._buckets[shuffled], kind="stable")]
        bounds = pack(self._lengths[shuffled], self.cfg.max_batch_length)
        order = rng.permutation(len(bounds) - 1)
        return BatchList(self._rows[shuffled], bounds, self._whole_rounds(order))

    def _shares(self, sources: Integers, weights: list[float]) -> NDArray[np.float64]:
        """Mean occurrences of each row in an epoch that give the manifests their shares of the hours."""
        hours = np.bincount(sources, self._lengths, minlength=len(weights))
        if not hours.all():
            empty = self.cfg.manifests[int(np.argmin(hours))]
            raise InputError(f"{empty}: no recording is long enough; leave the manifest out of data.manifest.")
        times: NDArray[np.float64] = np.array(weights) / sum(weights) * hours.sum() / hours
        return times[sources]

    def _whole_rounds(self, order: Integers) -> Integers:
        name, count = self.cfg.manifest, len(order)
        if count < self.world_size:
            raise InputError(
                f"{name}: {count} batches for {self.world_size} processes. Use fewer processes, more recordings or a "
                f"smaller max_batch_length ({self.cfg.max_batch_length})."
            )
        if not self.cfg.drop_last:
            return np.resize(order, -(-count // self.round_size) * self.round_size)
        if count < self.round_size:
            raise InputError(
                f"{name}: {count} batches do not fill one step of {self.round_size}, and drop_last drops the rest."
            )
        return order[: count // self.round_size * self.round_size]


def sorted_batches(lengths: Integers, cfg: DataConfig) -> BatchList:
    """Each sufficiently long recording once, in batches of similar length, from shortest to longest."""
    rows, capped = usable_rows(lengths, cfg)
    order = np.argsort(capped, kind="stable")
    bounds = pack(capped[order], cfg.max_batch_length)
    return BatchList(rows[order], bounds, np.arange(len(bounds) - 1))


def usable_rows(lengths: Integers, cfg: DataConfig, shortest: int = 1) -> tuple[Integers, Integers]:
    """Rows that are long enough, and their lengths cut to ``max_sample_size``."""
    shortest = max(shortest, cfg.min_sample_size)
    rows = np.flatnonzero(lengths >= shortest).astype(np.int32)
    if len(rows) == 0:
        raise InputError(
            f"{cfg.manifest}: no recording has {shortest} samples (min_sample_size is {cfg.min_sample_size}); the "
            f"longest of {len(lengths)} has {np.max(lengths, initial=0)}."
        )
    return rows, np.minimum(lengths[rows], cfg.max_sample_size).astype(np.int32)


def bucket_boundaries(lengths: Integers, cfg: DataConfig) -> NDArray[np.float64]:
    """The ``num_buckets + 1`` boundaries between buckets, in samples."""
    if cfg.bucket_method == "uniform":
        return np.linspace(cfg.min_sample_size - 1, cfg.max_sample_size + 1, cfg.num_buckets + 1)
    ranks = np.linspace(0, len(lengths) - 1, cfg.num_buckets + 1)
    return np.interp(ranks, np.arange(len(lengths)), np.sort(lengths))


def pack(lengths: Integers, max_batch_length: int) -> Integers:
    """Fill batches in the order of ``lengths`` (N,), up to ``max_batch_length`` each: where batches begin, and N."""
    ends = np.cumsum(lengths, dtype=np.int64)
    # following[i]: start of the next batch if one starts at i. Found for all i at once, then followed from 0.
    following = np.searchsorted(ends, ends - lengths + max_batch_length, side="right")
    bounds = [0]
    while bounds[-1] < len(lengths):
        bounds.append(int(following[bounds[-1]]))
    return np.array(bounds)

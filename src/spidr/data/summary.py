"""Summarise how much of a manifest is used in training, and why the rest is not."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spidr.config import SAMPLE_RATE, DataConfig
from spidr.data.sampler import BatchList


def duration(hours: float) -> str:
    """Format hours, or minutes if it is less than an hour."""
    return f"{hours:,.2f} h" if hours >= 1 else f"{60 * hours:.2f} min"


@dataclass(frozen=True)
class DataSummary:
    """The contents of a manifest, and how much of it the first epoch uses."""

    recordings: int  # listed
    hours: float
    batches: int = 0  # of an epoch
    hours_used: float = 0.0  # used in an epoch
    too_short: int = 0  # recordings shorter than min_sample_size, which are skipped
    hours_too_short: float = 0.0
    hours_above_maximum: float = 0.0  # beyond max_sample_size; with random crops, epochs use different parts
    hours_cropped: float = 0.0  # cropped to the shortest recording of a batch
    hours_dropped: float = 0.0  # in the last batches, dropped by drop_last

    def __str__(self) -> str:
        lost = {
            f"{duration(self.hours_too_short)} in {self.too_short:,} recordings that are too short": self.too_short,
            f"{duration(self.hours_above_maximum)} beyond max_sample_size": self.hours_above_maximum,
            f"{duration(self.hours_cropped)} cropped to the shortest of a batch": self.hours_cropped,
            f"{duration(self.hours_dropped)} of the last batches": self.hours_dropped,
        }
        parts = ", ".join(text for text, amount in lost.items() if amount)
        heard = f"an epoch hears {duration(self.hours_used)} in {self.batches:,} batches"
        not_heard = f"; not heard: {parts}" if parts else ""
        return f"{self.recordings:,} recordings, {duration(self.hours)}; {heard}{not_heard}"

    def warnings(self, cfg: DataConfig) -> list[str]:
        """Say why more than 5 % of the recordings or hours are lost, and which setting to change."""
        shortest, longest = (f"{n} samples ({n / SAMPLE_RATE:g} s)" for n in (cfg.min_sample_size, cfg.max_sample_size))
        short = max(self.too_short / self.recordings, self.hours_too_short / self.hours)
        above, dropped = self.hours_above_maximum / self.hours, self.hours_dropped / self.hours
        cropped = self.hours_cropped / ((self.hours_used + self.hours_cropped) or 1)
        long = "cut long recordings into pieces (`start`, `end` in the manifest) or raise it"
        uneven = "raise data.num_buckets, or leave out short ones with data.min_sample_size"
        losses = {
            f"recordings are left out: shorter than data.min_sample_size = {shortest} or a frame of the model": short,
            f"hours are not heard in an epoch: beyond data.max_sample_size = {longest}; {long}": above,
            "audio in batches is cut off: all recordings of a batch are cropped to its shortest; set "
            f"data.enable_padding = true, {uneven}": cropped,
            "hours are in the last batches, which are dropped: set data.drop_last = false": dropped,
        }
        return [f"{100 * share:.0f} % of the {what}" for what, share in losses.items() if share > 0.05]

    def log(self, logger: logging.Logger, cfg: DataConfig) -> None:
        """Log the summary and its warnings."""
        logger.info("data: %s", self)
        for warning in self.warnings(cfg):
            logger.warning("data: %s", warning)


def summarise(
    lengths: NDArray[np.integer[Any]], cfg: DataConfig, shortest: int, batches: BatchList | None
) -> DataSummary:
    """Summarise an epoch's use of recordings of these ``lengths``, of at least ``shortest`` samples.

    Without ``batches``, which may not exist yet, those are omitted.
    """
    hour = 3600 * SAMPLE_RATE
    short = lengths < shortest
    capped = np.minimum(lengths, cfg.max_sample_size)
    known = DataSummary(
        recordings=len(lengths),
        hours=float(lengths.sum()) / hour,
        too_short=int(short.sum()),
        hours_too_short=float(lengths[short].sum()) / hour,
        hours_above_maximum=float((lengths - capped)[~short].sum()) / hour,
    )
    if batches is None:
        return known
    inside = capped[batches.rows]
    begins, sizes = batches.bounds[:-1], np.diff(batches.bounds)
    full = np.add.reduceat(inside, begins, dtype=np.int64)
    heard = full if cfg.enable_padding else np.minimum.reduceat(inside, begins).astype(np.int64) * sizes
    order = np.unique(batches.order)
    return replace(
        known,
        batches=len(batches),
        hours_used=float(heard[order].sum()) / hour,
        hours_cropped=float((full - heard)[order].sum()) / hour,
        hours_dropped=float(full.sum() - full[order].sum()) / hour,
    )

"""Random spans of frames and channels to hide from the student, drawn for a whole batch at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spidr.config import MaskingConfig, MaskingStrategy

Integers = NDArray[np.integer[Any]]

Generators = Sequence[np.random.Generator]
"""One generator per batch, or one per row; then other rows only affect how many of a row's masked frames are kept."""


class MaskGenerator:
    """Draws masks of frames, and of channels if ``mask_channel_prob`` is above 0.

    For an utterance of ``t`` frames, ``n = max(2, floor(mask_prob * t / mask_length + u))`` spans are drawn, with ``u``
    uniform in [0, 1); then all rows of the batch keep as many masked frames as the row with the fewest. The same holds
    for channels, without the minimum of 2; but rows with generators of their own keep all their channels. The
    strategies for span lengths and ``no_mask_overlap`` are those of wav2vec 2.0 (https://arxiv.org/abs/2006.11477) in
    fairseq.

    Attributes:
        frames: The spans of frames.
    """

    def __init__(self, cfg: MaskingConfig) -> None:
        self.frames = Spans.of(cfg, "mask", min_spans=2)
        self._channels = Spans.of(cfg, "mask_channel", min_spans=0)

    @property
    def masks_channels(self) -> bool:
        """Whether channels are masked."""
        return self._channels.prob > 0

    def __call__(
        self, padding_mask: Tensor, *, channels: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draw the masks of a batch.

        Args:
            padding_mask: bool (B, T), True for frames that are padding, which always come last in a row.
            channels: Number of feature channels; None: no channel mask.
            generator: Source of randomness; None: torch's default generator.

        Returns:
            The mask (B, T), True for masked frames, equally many in each row; and the channel mask (B, channels), True
            for channels to set to zero, or None.
        """
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device if generator else "cpu"))
        rng = [np.random.default_rng(seed)]
        lengths = (~padding_mask).sum(1).cpu().numpy()
        mask = torch.zeros(padding_mask.shape, dtype=torch.bool)
        mask.scatter_(1, torch.from_numpy(self.frames.draw(lengths, rng)), value=True)
        if channels is None or not self.masks_channels:
            return mask.to(padding_mask.device), None
        channel_mask = torch.from_numpy(self.draw_channels(len(lengths), channels, rng))
        return mask.to(padding_mask.device), channel_mask.to(padding_mask.device)

    def draw_channels(self, rows: int, channels: int, rngs: Generators) -> NDArray[np.bool_]:
        """Draw the masked channels of each row: bool (rows, channels)."""
        mask = np.zeros((rows, channels), dtype=np.bool_)
        for part, rng in zip(np.split(mask, len(rngs)), rngs, strict=True):
            np.put_along_axis(part, self._channels.draw(np.full(len(part), channels), [rng]), values=True, axis=1)
        return mask


@dataclass(frozen=True)
class Spans:
    """Random spans; the fields are those of :class:`spidr.config.MaskingConfig`."""

    prob: float
    selection: MaskingStrategy
    other: float
    length: int
    no_overlap: bool
    min_space: int
    min_spans: int

    @classmethod
    def of(cls, cfg: MaskingConfig, name: str, min_spans: int) -> Self:
        """Take the settings whose names begin with ``name``."""
        same = {key: getattr(cfg, f"{name}_{key}") for key in ("prob", "selection", "other", "length", "min_space")}
        return cls(**same, no_overlap=getattr(cfg, f"no_{name}_overlap"), min_spans=min_spans)

    def draw(self, lengths: Integers, rngs: Generators) -> NDArray[np.int64]:
        """Draw positions inside spans for rows of these lengths (B,), equally many in each row.

        There is one generator, or one per row. Returns int64 (B, M), ascending.
        """
        width = int(np.max(lengths))
        masks, keys = [], []
        for part, rng in zip(np.split(lengths, len(rngs)), rngs, strict=True):
            masks.append(self.draw_masks(part, width, rng))
            keys.append(rng.random((len(part), width), dtype=np.float32))
        mask = np.concatenate(masks)
        keep = int(np.min(mask.sum(1)))
        if keep == 0:
            return np.empty((len(lengths), 0), dtype=np.int64)
        # The positions with the smallest random keys are a random choice.
        key = np.where(mask, np.concatenate(keys), np.float32(2))
        return np.sort(np.argpartition(key, keep - 1, axis=1)[:, :keep], axis=1)

    def draw_masks(self, lengths: Integers, width: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Draw the spans of each row and unite them: bool (B, width), False from the row's length on."""
        counts = np.floor(self.prob * lengths / self.length + rng.random(len(lengths))).astype(np.int64)
        counts = np.maximum(counts, self.min_spans)
        if np.max(counts) == 0:
            return np.zeros((len(lengths), width), dtype=np.bool_)
        used = np.arange(np.max(counts)) < counts[:, None]
        spans = np.where(used, self._span_lengths(used.shape, rng), 0)
        empty = (counts > 0) & (spans.max(1) == 0)
        spans[empty, 0] = np.minimum(self.length, lengths[empty] - 1)
        if self.no_overlap:
            starts, spans = _place_apart(lengths, spans, self.min_space, rng)
        else:
            shortest = np.where(used, spans, np.max(spans)).min(1)
            starts, spans = _place_anywhere(lengths, counts, spans, shortest, rng)
        return _union(lengths, starts, spans, width)

    def _span_lengths(self, shape: tuple[int, ...], rng: np.random.Generator) -> Integers:
        match self.selection:
            case "static":
                return np.full(shape, self.length)
            case "uniform":
                return rng.integers(int(self.other), 2 * self.length + 1, shape)
            case "normal":
                return np.maximum(1, np.round(rng.normal(self.length, self.other, shape))).astype(np.int64)
            case "poisson":
                return rng.poisson(rng.random(shape) * self.length)


def _place_anywhere(
    lengths: Integers, counts: Integers, spans: Integers, shortest: Integers, rng: np.random.Generator
) -> tuple[Integers, Integers]:
    """Draw distinct starts for the spans of each row, among all positions where the shortest would fit."""
    stop = lengths - shortest
    stop = np.where(stop > counts, stop, np.minimum(counts + 1, lengths))
    # Positions sorted by random keys are a draw without replacement.
    keys = rng.random((len(lengths), int(np.max(stop))))
    keys[np.arange(keys.shape[1]) >= stop[:, None]] = 2
    starts = np.argsort(keys, axis=1)[:, : spans.shape[1]]
    spans = spans[:, : starts.shape[1]]
    return starts, np.where(np.arange(starts.shape[1]) < np.minimum(counts, stop)[:, None], spans, 0)


def _place_apart(
    lengths: Integers, spans: Integers, min_space: int, rng: np.random.Generator
) -> tuple[Integers, Integers]:
    """Draw starts such that spans are at least ``min_space`` apart, the longest placed first.

    Each span goes into a free part that can hold it, chosen with a probability proportional to the part's length. From
    the first span that fits nowhere on, the row's lengths are 0.
    """
    spans = -np.sort(-spans, axis=1)
    shares = rng.random(spans.shape)
    waits = rng.standard_exponential((len(spans), 2 * spans.shape[1] + 1))  # one per possible part
    rows = zip(*(array.tolist() for array in (lengths, spans, (spans > 0).sum(1), shares, waits)), strict=True)
    found = [_place_row(length, row[:count], min_space, *draws) for length, row, count, *draws in rows]
    placed = np.arange(spans.shape[1]) < np.array([len(starts) for starts in found])[:, None]
    starts = np.zeros_like(spans)
    starts[placed] = list(chain.from_iterable(found))
    return starts, np.where(placed, spans, 0)


def _place_row(length: int, spans: list[int], min_space: int, shares: list[float], waits: list[float]) -> list[int]:
    """Place the spans of a row, the longest first, up to the first that fits nowhere, and return their starts.

    ``shares`` in [0, 1), one per span, choose its place within a free part. The parts race for the span: each waits for
    a time that is exponentially distributed with its length as the rate (``waits`` are standard exponential draws), and
    the first one takes it. That draws in proportion to the lengths without summing them for each span
    (https://en.wikipedia.org/wiki/Exponential_distribution, distribution of the minimum). For so few numbers, Python's
    lists are faster than arrays.
    """
    starts: list[int] = []
    now = 0.0
    racing: list[tuple[float, int, int]] = []  # a heap of the parts that can hold the next span: (time, begin, room)
    aside = [(-length, 0)]  # a heap of those that can only hold a shorter span: (-room, begin)
    wait = iter(waits)
    for span, share in zip(spans, shares, strict=False):
        while aside and -aside[0][0] >= span:
            negative_room, begin = heappop(aside)
            heappush(racing, (now - next(wait) / negative_room, begin, -negative_room))
        if not racing:
            break
        now, begin, room = heappop(racing)
        before = int(share * (room - span + 1))
        starts.append(begin + before)
        after = room - before - span - min_space
        for part_begin, part_room in ((begin, before - min_space), (begin + room - after, after)):
            if part_room >= span:
                heappush(racing, (now + next(wait) / part_room, part_begin, part_room))
            elif part_room >= spans[-1]:
                heappush(aside, (-part_room, part_begin))
    return starts


def _union(lengths: Integers, starts: Integers, spans: Integers, width: int) -> NDArray[np.bool_]:
    """Mark the positions that a span covers, up to each row's length: bool (B, width)."""
    first = np.arange(len(lengths))[:, None] * (width + 1)
    stops = np.minimum(starts + spans, lengths[:, None])
    size = len(lengths) * (width + 1)
    # A counter goes up where a span starts and down where it ends.
    used = spans > 0
    changes = np.bincount((first + starts)[used], minlength=size) - np.bincount((first + stops)[used], minlength=size)
    covered: NDArray[np.bool_] = np.cumsum(changes.reshape(len(lengths), width + 1), axis=1)[:, :width] > 0
    return covered

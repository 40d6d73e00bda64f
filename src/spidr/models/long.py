"""Long recordings, a window at a time: the same numbers as from the whole waveform, in memory that does not grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spidr.tools.frames import conv_length, receptive_field

if TYPE_CHECKING:
    from spidr.models.dinosr import DinoSR

Read = Callable[[int, int], Tensor]
"""A range of a waveform, from the first sample up to the second: (1, stop - start) float."""

PIECE = 1 << 20
"""Samples to read at once when a whole recording is standardised."""


def standardised(read: Read, num_samples: int) -> Read:
    """A recording with mean 0 and variance 1, as :meth:`DinoSR.encode` standardises it, read twice for its moments."""

    def mean_of(function: Callable[[Tensor], Tensor]) -> Tensor:
        sums = [
            function(read(start, min(start + PIECE, num_samples))).sum(1, keepdim=True, dtype=torch.float64)
            for start in range(0, num_samples, PIECE)
        ]
        return torch.stack(sums).sum(0) / num_samples

    mean = mean_of(lambda x: x.cpu()).float()
    scale = torch.rsqrt(mean_of(lambda x: (x.cpu() - mean).square()) + 1e-5).float()

    def read_standardised(start: int, stop: int) -> Tensor:
        waveform = read(start, stop)
        return (waveform - mean.to(waveform)) * scale.to(waveform)

    return read_standardised


@torch.no_grad()
def windows(
    model: DinoSR,
    read: Read,
    num_samples: int,
    function: Callable[[Tensor, None], Tensor],
    *,
    size: int,
    context: int,
) -> Iterator[Tensor]:
    """What a function makes of the model's projected features, a window at a time.

    Args:
        model: Any; a group norm needs the whole waveform at once.
        read: The waveform, standardised.
        num_samples: Its length.
        function: Projected features (1, T, D) and no attention mask to (1, T, …).
        size: Frames in a window.
        context: Frames seen on each side of it.

    Yields:
        The function's values for each window in turn, (1, at most ``size``, …).
    """
    shapes = model.feature_extractor.shapes
    hop, field, num_frames = math.prod(s for *_, s in shapes), receptive_field(shapes), conv_length(shapes, num_samples)
    whole = model.project(read(0, num_samples))[0] if model.feature_extractor.mode == "group_norm" else None

    def project(start: int, stop: int) -> Tensor:
        if whole is not None:
            return whole[:, start:stop]
        return model.project(read(start * hop, (stop - 1) * hop + field))[0]

    seen, first, last = None, 0, 0  # projected features of frames first to last
    for start in range(0, num_frames, size):
        stop, left = min(start + size, num_frames), max(0, start - context)
        right = min(stop + context, num_frames)
        parts = [] if seen is None else [seen[:, left - first :]]
        if right > last:
            parts.append(project(last, right))
        seen, first, last = torch.cat(parts, 1), left, right
        yield function(seen, None)[:, start - left : stop - left]

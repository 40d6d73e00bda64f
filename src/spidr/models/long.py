"""Long recordings, a window at a time: the same numbers as from the whole waveform, in memory that does not grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from spidr.tools.frames import conv_length, receptive_field

Read = Callable[[int, int], Tensor]
"""A range of a waveform, from the first sample up to the second: (1, stop - start) float."""

PIECE = 1 << 20
"""Samples to read at once when a whole recording is standardised."""


def standardised(read: Read, num_samples: int) -> Read:
    """A recording with mean 0 and variance 1, as an encoder standardises it; read twice for its moments."""

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
    project: Callable[[Tensor], Tensor],
    shapes: Sequence[tuple[int, int, int]],
    read: Read,
    num_samples: int,
    function: Callable[[Tensor, None], Tensor],
    *,
    size: int,
    context: int,
    whole: bool = False,
) -> Iterator[Tensor]:
    """What a function makes of a model's projected features, a window at a time.

    Args:
        project: A waveform (1, S) to projected features (1, T, D).
        shapes: (out_channels, kernel, stride) of the convolutions in it.
        read: The waveform, standardised.
        num_samples: Its length.
        function: Projected features (1, T, D) and no attention mask to (1, T, …).
        size: Frames in a window.
        context: Frames seen on each side of it.
        whole: Project the whole waveform at once, as a group norm needs it.

    Yields:
        The function's values for each window in turn, (1, at most ``size``, …).
    """
    hop, field, num_frames = math.prod(s for *_, s in shapes), receptive_field(shapes), conv_length(shapes, num_samples)
    projected = project(read(0, num_samples)) if whole else None

    def frames(start: int, stop: int) -> Tensor:
        if projected is not None:
            return projected[:, start:stop]
        return project(read(start * hop, (stop - 1) * hop + field))

    seen, first, last = None, 0, 0  # projected features of frames first to last
    for start in range(0, num_frames, size):
        stop, left = min(start + size, num_frames), max(0, start - context)
        right = min(stop + context, num_frames)
        parts = [] if seen is None else [seen[:, left - first :]]
        if right > last:
            parts.append(frames(last, right))
        seen, first, last = torch.cat(parts, 1), left, right
        yield function(seen, None)[:, start - left : stop - left]

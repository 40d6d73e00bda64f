"""Long recordings, a window at a time: the same numbers as from the whole waveform, in memory that does not grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from spidr.tools.errors import InputError
from spidr.tools.frames import conv_length, receptive_field

Read = Callable[[int, int], Tensor]
"""A range of a waveform, from the first sample up to the second: (1, stop - start) float."""

PIECE = 1 << 20
"""Samples to read at once when a whole recording is standardised."""


class Standardised:
    """A recording with mean 0 and variance 1, as an encoder standardises it; read twice for its moments.

    Attributes:
        std: Its standard deviation.
    """

    def __init__(self, read: Read, num_samples: int) -> None:
        def mean_of(function: Callable[[Tensor], Tensor]) -> Tensor:
            parts = (read(start, min(start + PIECE, num_samples)).cpu() for start in range(0, num_samples, PIECE))
            return torch.stack([function(part).sum(1, keepdim=True, dtype=torch.float64) for part in parts]).sum(0)

        self._read = read
        self._mean = (mean_of(lambda x: x) / num_samples).float()
        variance = mean_of(lambda x: (x - self._mean).square()) / num_samples
        self._scale = torch.rsqrt(variance + 1e-5).float()
        self.std = math.sqrt(float(variance))

    def __call__(self, start: int, stop: int) -> Tensor:
        """Samples ``start`` to ``stop``, standardised."""
        waveform = self._read(start, stop)
        return (waveform - self._mean.to(waveform)) * self._scale.to(waveform)


def window_frames(window: float, context: float | None, frame_seconds: float) -> tuple[int, int]:
    """Frames in a window, and frames seen on each side of it.

    Args:
        window: Seconds.
        context: Seconds; None: a quarter of the window.
        frame_seconds: Seconds from one frame to the next.

    Raises:
        InputError: They are no numbers of frames.
    """
    for name, seconds in (("window", window), ("context", context)):
        if seconds is not None and not math.isfinite(seconds):
            raise InputError(f"{name} = {seconds} s is no number of seconds")
    size, around = round(window / frame_seconds), round((window / 4 if context is None else context) / frame_seconds)
    if size < 1:
        raise InputError(f"window = {window} s is shorter than a frame of {frame_seconds} s")
    if around < 0:
        raise InputError(f"context = {context} s needs to be at least 0 and goes with a window")
    return size, around


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

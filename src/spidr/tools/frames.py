"""How many frames a stack of convolutions makes of a waveform."""

from collections.abc import Iterable
from typing import Any, TypeVar

Length = TypeVar("Length")


def conv_length(shapes: Iterable[tuple[int, int, int]], lengths: Length) -> Length:
    """Number of frames the convolutions ``shapes`` make of ``lengths`` samples.

    Args:
        shapes: (out_channels, kernel, stride) of each convolution, all without padding.
        lengths: A number of samples: an int, or an integer array or tensor of them.

    Returns:
        As many numbers of frames, 0 where the samples do not fill one kernel.
    """
    for _, kernel, stride in shapes:
        frames: Any = (lengths - kernel) // stride + 1  # type: ignore[operator]
        lengths = frames * (frames > 0)
    return lengths


def receptive_field(shapes: Iterable[tuple[int, int, int]]) -> int:
    """Number of samples that one frame of the convolutions ``shapes`` sees."""
    samples = 1
    for _, kernel, stride in reversed(list(shapes)):
        samples = (samples - 1) * stride + kernel
    return samples

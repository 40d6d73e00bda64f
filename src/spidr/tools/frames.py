"""Numbers of frames and samples of a stack of convolutions."""

from collections.abc import Iterable
from typing import Any, TypeVar

Length = TypeVar("Length")


def conv_length(shapes: Iterable[tuple[int, int, int]], lengths: Length) -> Length:
    """Number of frames that convolutions make from a number of samples.

    Args:
        shapes: (out_channels, kernel, stride) of each convolution, without padding.
        lengths: Number of samples: an int, or an integer array or tensor.

    Returns:
        Number of frames, of the same type; 0 if the samples do not fill the kernels.
    """
    for _, kernel, stride in shapes:
        frames: Any = (lengths - kernel) // stride + 1  # type: ignore[operator]
        lengths = frames * (frames > 0)
    return lengths


def samples_of(shapes: Iterable[tuple[int, int, int]], frames: int) -> int:
    """Smallest number of samples that gives a number of frames, at least one."""
    for _, kernel, stride in reversed(list(shapes)):
        frames = (frames - 1) * stride + kernel
    return frames


def receptive_field(shapes: Iterable[tuple[int, int, int]]) -> int:
    """Number of samples that one frame sees."""
    return samples_of(shapes, 1)

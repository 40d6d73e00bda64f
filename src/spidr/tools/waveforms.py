"""Standardise waveforms: mean 0 and variance 1 over each utterance."""

import math
import warnings
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

EPS = 1e-5  # added to the variance, as in PyTorch's LayerNorm
QUIET = 10**-4.5  # variance of a recording at -45 dBFS, below which `EPS` shrinks it by more than a tenth
BLOCK = 1 << 20  # samples to sum at a time
Read = Callable[[int, int], Tensor]  # samples (B, stop - start) of waveforms, from `start` to `stop`


def moments(waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute mean and population variance, (B, 1) each, of utterances in float64 (in float32 on MPS).

    Of waveforms (B, S), the first ``lengths`` (B,) samples count; None: all.
    """
    parts = [waveforms] if torch.compiler.is_compiling() else waveforms.split(BLOCK, dim=1)
    return _moments(lambda: iter(parts), waveforms.shape[1], lengths)


def _moments(parts: Callable[[], Iterator[Tensor]], samples: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    count = samples if lengths is None else lengths.unsqueeze(1)

    def mean_of(function: Callable[[Tensor], Tensor]) -> Tensor:
        total: Tensor | None = None
        start = 0
        for part in parts():
            values = function(part)
            if lengths is not None:
                values = values.masked_fill(_padding(part, lengths - start), 0)
            exact = torch.float32 if part.device.type == "mps" else torch.float64
            found = values.sum(1, keepdim=True, dtype=exact)
            # A running sum, since small tensors kept between large ones fragment the heap.
            total = found if total is None else total + found
            start += part.shape[1]
        assert total is not None
        return total / count

    mean = mean_of(lambda part: part)
    return mean, mean_of(lambda part: (part - mean.to(part.dtype)).square())


def standardise(
    waveforms: Tensor, lengths: Tensor | None = None, *, statistics: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Give each utterance mean 0 and variance 1: ``(x - mean) / sqrt(variance + 1e-5)``.

    Args:
        waveforms: (B, S) float, of any sampling rate.
        lengths: Samples that count in each row, (B,); what follows becomes 0. None: all count.
        statistics: Mean and variance from :func:`moments`, such as those of the whole utterance for a part of it.
            None: those of these waveforms.

    Returns:
        (B, S) in the type of ``waveforms``.
    """
    mean, var = moments(waveforms, lengths) if statistics is None else statistics
    out = (waveforms - mean.to(waveforms.dtype)) * torch.rsqrt(var + EPS).to(waveforms.dtype)
    return out if lengths is None else out.masked_fill(_padding(waveforms, lengths), 0)


class Standardised:
    """A standardised recording that is never in memory as a whole; its moments take two extra passes.

    ``read`` gives its samples (1, stop - start); ``std`` is its standard deviation.
    """

    def __init__(self, read: Read, num_samples: int) -> None:
        def parts() -> Iterator[Tensor]:
            return (read(start, min(start + BLOCK, num_samples)) for start in range(0, num_samples, BLOCK))

        self._read, self._moments = read, _moments(parts, num_samples, None)
        self.std = math.sqrt(float(self._moments[1]))

    def __call__(self, start: int, stop: int) -> Tensor:
        """Read samples ``start`` to ``stop``, standardised."""
        return standardise(self._read(start, stop), statistics=self._moments)


def warn_if_quiet(variance: float) -> None:
    """Warn, once per process, about a recording below -45 dBFS."""
    if variance < QUIET:
        _warn_of_quiet_recordings()


@cache
def _warn_of_quiet_recordings() -> None:
    warnings.warn(
        "a recording is quieter than -45 dBFS (root mean square, full scale 1): standardising adds 1e-5 to its "
        "variance, as in training, so it stays quieter than others and its units may be worse; raise its "
        "volume first if it is speech",
        stacklevel=3,
    )


def _padding(waveforms: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(waveforms.shape[1], device=waveforms.device) >= lengths.unsqueeze(1)

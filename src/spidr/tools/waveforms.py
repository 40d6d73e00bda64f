"""Standardisation of waveforms: mean 0 and variance 1 over each utterance."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

EPS = 1e-5
"""Added to the variance, as in PyTorch's LayerNorm."""

QUIET = 10**-4.5
"""Variance of a recording at -45 dBFS, below which ``EPS`` shrinks it by more than a tenth."""

BLOCK = 1 << 20
"""Samples that are summed at a time."""

_warned = False


def moments(waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and population variance of each utterance, summed in float64 (MPS: float32, it has no other).

    Args:
        waveforms: (B, S) float.
        lengths: Samples that count in each row, (B,); None: all.

    Returns:
        Mean and variance, (B, 1) each.
    """
    exact = torch.float32 if waveforms.device.type == "mps" else torch.float64
    count = waveforms.shape[1] if lengths is None else lengths.unsqueeze(1)
    parts = [waveforms] if torch.compiler.is_compiling() else waveforms.split(BLOCK, dim=1)

    def total(shift: Tensor | None) -> Tensor:
        sums, start = waveforms.new_zeros(waveforms.shape[0], 1, dtype=exact), 0
        for part in parts:
            value = part if shift is None else (part - shift).square()
            if lengths is not None:
                value = value.masked_fill(_padding(part, lengths - start), 0)
            sums = sums + value.sum(1, keepdim=True, dtype=exact)
            start += part.shape[1]
        return sums

    mean = total(None) / count
    return mean, total(mean.to(waveforms.dtype)) / count


def standardise(
    waveforms: Tensor, lengths: Tensor | None = None, *, statistics: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Give each utterance mean 0 and variance 1: ``(x - mean) / sqrt(variance + 1e-5)``.

    Args:
        waveforms: (B, S) float, of any sampling rate.
        lengths: Samples that count in each row, (B,); what follows becomes 0. None: all count.
        statistics: Mean and variance as :func:`moments` gives them, for a part of an utterance those of the whole.
            None: of these waveforms.

    Returns:
        (B, S) in the type of ``waveforms``.
    """
    mean, var = moments(waveforms, lengths) if statistics is None else statistics
    out = (waveforms - mean.to(waveforms.dtype)) * torch.rsqrt(var + EPS).to(waveforms.dtype)
    return out if lengths is None else out.masked_fill(_padding(waveforms, lengths), 0)


def warn_if_quiet(variance: float) -> None:
    """Warn once in a process about a recording below -45 dBFS."""
    global _warned
    if variance < QUIET and not _warned:
        _warned = True
        warnings.warn(
            "a recording is quieter than -45 dBFS (root mean square, full scale 1): standardising adds 1e-5 to its "
            "variance, as in training, so it comes out quieter than others and its units may be worse; raise its "
            "volume first if it is speech",
            stacklevel=2,
        )


def _padding(waveforms: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(waveforms.shape[1], device=waveforms.device) >= lengths.unsqueeze(1)

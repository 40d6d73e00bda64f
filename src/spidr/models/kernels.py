"""Operations that take less time and memory than PyTorch's own when training on a CPU.

Elsewhere, and in compiled code, PyTorch's own kernels are the better ones and are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WEIGHTS_AT_A_TIME = 1 << 20
"""Attention weights that are computed together: so many stay in a core's cache."""


def is_lean(x: Tensor) -> bool:
    """Whether these operations serve here: in eager mode on a CPU, with a backward pass to come."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def recomputed(function: Callable[..., Tensor], *inputs: Any, draws: bool = False) -> Tensor:
    """Call a function, of which the backward pass computes again what would otherwise be kept: all but its last step.

    Args:
        function: Should end with what costs most, as that is not done twice.
        inputs: Of the function, kept for the backward pass.
        draws: Whether the function draws random numbers.
    """
    if not is_lean(inputs[0]):
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=draws)


def draw_dropped(shape: Sequence[int], p: float) -> tuple[Tensor, float]:
    """What dropout drops, out of 16 random bits for each element: ``bernoulli_`` takes eight times as long.

    Args:
        shape: Of the result.
        p: Probability to drop, strictly between 0 and 1. It is rounded to a multiple of 2^-16.

    Returns:
        Boolean, True where an element is dropped, and the factor for the others that keeps the expected value.
    """
    threshold = min(max(round(p * 2**16), 1), 2**16 - 1)
    count = math.prod(shape)
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    dropped = words.view(torch.int16)[:count].view(*shape) < threshold - 2**15
    return dropped, 2**16 / (2**16 - threshold)


class Dropout(nn.Dropout):
    """``torch.nn.Dropout``."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Any shape to the same."""
        if not self.training or not 0 < self.p < 1 or not is_lean(input):
            return super().forward(input)
        dropped, scale = draw_dropped(input.shape, self.p)
        return (input * scale).masked_fill(dropped, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """``scaled_dot_product_attention``.

    With dropout it materialises the weights of all heads several times and keeps them for the backward pass. Here,
    there are those of a few heads at a time, and the backward pass computes them again.

    Args:
        q: (B, H, T, D), like ``k`` and ``v``.
        k: See ``q``.
        v: See ``q``.
        mask: Boolean, True where to attend, broadcastable to (B, 1, T, T).
        dropout: Probability to drop a weight.

    Returns:
        (B, H, T, D).
    """
    if not 0 < dropout < 1 or not is_lean(q):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    batch, heads, frames, dim = q.shape
    dropped, scale = draw_dropped((batch * heads, frames, frames), dropout)
    together = max(1, WEIGHTS_AT_A_TIME // frames**2)
    inputs = [x.flatten(0, 1).split(together) for x in (q * dim**-0.5, k, v * scale)]
    hidden: Sequence[Tensor | None] = [None] * len(inputs[0])
    if mask is not None:
        mask = mask.expand(batch, heads, mask.shape[-2], frames)
        hidden = mask.logical_not().flatten(0, 1).split(together)
    parts = [recomputed(_attend, *args) for args in zip(*inputs, dropped.split(together), hidden, strict=True)]
    return torch.cat(parts).unflatten(0, (batch, heads))


def _attend(q: Tensor, k: Tensor, v: Tensor, dropped: Tensor, hidden: Tensor | None) -> Tensor:
    scores = q @ k.transpose(1, 2)
    if hidden is not None:
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if hidden is not None:
        weights = weights.masked_fill(hidden, 0)  # else those of a row without any key would not be zero
    return weights.masked_fill(dropped, 0).to(v.dtype) @ v

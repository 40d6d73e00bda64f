"""Operations that take less time or memory on a CPU than PyTorch's own.

On other devices, and in compiled, exported or traced code, PyTorch's own kernels are used.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spidr.tools.errors import InputError

ONEDNN_SETTING = "SPIDR_ONEDNN"
"""Environment variable: 1 computes float32 products with oneDNN, 0 with PyTorch's own. Unset: a rule decides."""

SMALLEST = 1 << 22
"""Multiplications below which a product is PyTorch's: calling oneDNN takes 13 µs more than calling MKL."""

WEIGHTS_AT_A_TIME = 1 << 20
"""Attention weights that are computed together: so many stay in a core's cache."""


def is_lean(x: Tensor) -> bool:
    """Whether these operations serve here: in eager mode on a CPU, with a backward pass to come."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


@cache
def prefers_onednn() -> bool:
    """Whether large float32 products go to oneDNN: on AMD processors with AVX-512, where MKL runs its AVX2 code.

    A rule instead of a timing, so that a resumed run computes the same bits.
    """
    chosen = os.environ.get(ONEDNN_SETTING)
    if chosen not in (None, "0", "1"):
        raise InputError(f"{ONEDNN_SETTING}: found {chosen!r}, expected 0 or 1")
    if chosen == "0" or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    amd = "AuthenticAMD" in processor()
    return chosen == "1" or (
        amd and torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def processor() -> str:
    """Text that names the maker of the processor."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor()


def is_plain(*tensors: Tensor) -> bool:
    """Whether operations of ours may take these tensors: on a CPU, and nobody records, transforms or compiles."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ) and all(x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter) for x in tensors)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, with oneDNN where that is faster."""
    if not _suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Linear.apply(x, weight, bias)
    return _onednn_linear(x, weight, bias)


def add_linear_(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add the product of matrices ``x @ weight.T`` to ``out``; without gradients."""
    if _suits_onednn(x, weight):
        out.add_(_onednn_linear(x, weight, None))
    else:
        out.addmm_(x, weight.T)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        is_plain(x, weight)
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.numel() * len(weight) >= SMALLEST
        and prefers_onednn()
    )


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    left = x.reshape(-1, x.shape[-1])
    if 1 not in left.stride() or 0 in left.stride():
        left = left.contiguous()
    if not weight.is_contiguous() and not weight.T.is_contiguous():  # oneDNN would take a thousand times as long
        weight = weight.contiguous()
    product = torch.ops.mkldnn._linear_pointwise.default(left, weight, bias, "none", [], "")
    return product.view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    """:func:`linear`, whose gradients are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            linear(grad, weight.T) if needs_x else None,
            linear(rows.T, x.reshape(-1, x.shape[-1]).T) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


class Linear(nn.Linear):
    """``torch.nn.Linear``."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """(..., in) to (..., out)."""
        return linear(input, self.weight, self.bias)


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

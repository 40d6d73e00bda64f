"""Fast operations of our own, and the rule for when they may replace modules.

There are three kinds: matrix products by the faster library; operations that save time and memory in training on a CPU
(on GPUs and in compiled code, PyTorch's own are better); and the feature extractor's convolutions as matrix products.
"""

import math
import os
import platform
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_module

from spidr.tools.errors import InputError
from spidr.tools.frames import conv_length, receptive_field

ONEDNN_SETTING = "SPIDR_ONEDNN"
"""Environment variable: 1 computes float32 products with oneDNN, 0 with PyTorch's own. Unset: a rule decides."""

SMALLEST = 1 << 22
"""Multiplications below which a product is PyTorch's: calling oneDNN takes 13 µs more than calling MKL."""

SMALLEST_BATCHED = 1 << 19
"""The same for the products of attention in bfloat16, of several heads at once."""

PADDED = 32
"""Keys are padded to a multiple of this in bfloat16: softmax is slow on the rest of a row that fills no vector."""

SAMPLES = 320_000
"""Samples that are convolved at a time without gradients: the first layer's output of an hour would fill 24 GB."""

CPU_SAMPLES = 64_000
"""The same on CPUs, with gradients too; twice as many in 16 bits. That output then has 26 MB, which malloc keeps: glibc
gives blocks of more than 32 MB back at once, and the kernel takes long to clear as many pages again."""

ROWS_AT_A_TIME = 4096
"""Frames whose squares are summed together: they fit in a core's cache."""

WEIGHTS_AT_A_TIME = 1 << 20
"""Attention weights that are computed together: so many stay in a core's cache."""

# ---------------------------------------------------------------------------------------- when modules may be bypassed

M = TypeVar("M", bound=type[nn.Module])

_FORWARDS: dict[type, Any] = {cls: cls.forward for cls in (nn.Linear, nn.LayerNorm, nn.Conv1d, nn.LogSoftmax)}
"""Classes whose modules may be bypassed, with their ``forward``."""


_TENSORS = ("Parameter", "Tensor", "FakeTensor")
"""Types of weights. Others, as quantisation puts in their place, bring operations of their own."""


def known(cls: M) -> M:
    """Class decorator: modules of this class may be bypassed as long as they are untouched."""
    _FORWARDS[cls] = cls.forward
    return cls


def untouched(*modules: nn.Module | None) -> bool:
    """Whether nobody registered anything on the modules, or on those in them, and none was changed or replaced.

    The one question to ask before computing what a module would compute without calling it: hooks of all kinds (global
    ones too), parametrisations, pruning, quantisation, replacements and overridden ``forward`` methods answer no.
    """
    if torch_module._has_any_global_hook():
        return False
    for module in modules:  # in loops: torch.compile traces this
        if module is None:
            continue
        cls = type(module)
        if cls is not nn.ModuleList and _FORWARDS.get(cls) is not cls.forward:
            return False
        if (
            "forward" in module.__dict__
            or module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or not untouched(*module._modules.values())
        ):
            return False
        if not torch.compiler.is_compiling():
            for tensor in module._parameters.values():
                if tensor is not None and type(tensor).__name__ not in _TENSORS:
                    return False
    return True


# -------------------------------------------------------------------------------------------------------- on a GPU

_tf32_lock = threading.Lock()
_tf32_users = 0
_tf32_before: list[tuple[Any, str, Any]] = []


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Compute float32 products and convolutions in float32, not in TF32, so that a GPU gives what a CPU gives.

    The switches are the process's: the first of several threads sets them, the last one restores them.
    """
    global _tf32_users
    if device.type != "cuda" or torch.compiler.is_compiling():
        yield
        return
    with _tf32_lock:
        _tf32_users += 1
        if _tf32_users == 1:
            _tf32_before[:] = _switch_tf32_off()
    try:
        yield
    finally:
        with _tf32_lock:
            _tf32_users -= 1
            if _tf32_users == 0:
                for where, name, value in _tf32_before:
                    setattr(where, name, value)


def _switch_tf32_off() -> list[tuple[Any, str, Any]]:
    """Change the settings; returns the values they had."""
    matmul, cudnn = torch.backends.cuda.matmul, cast("Any", torch.backends.cudnn)
    if hasattr(matmul, "fp32_precision"):  # from torch 2.9 on, where the older switches warn
        switches: list[tuple[Any, str, Any]] = [
            (matmul, "fp32_precision", "ieee"),
            (cudnn.conv, "fp32_precision", "ieee"),
        ]
    else:
        switches = [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
    before = [(where, name, getattr(where, name)) for where, name, _ in switches]
    for where, name, value in switches:
        setattr(where, name, value)
    return before


# ---------------------------------------------------------------------------------- products by the faster library


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
    """Description of the processor, its vendor included."""
    try:
        return Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:  # not Linux
        return platform.processor()


def multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether oneDNN's products of this type are the fastest there are."""
    if dtype == torch.bfloat16 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and prefers_onednn()


def is_plain(*tensors: Tensor) -> bool:
    """Whether operations of ours may take these tensors: on a CPU, and nobody records, transforms or compiles."""
    return not (_is_transformed() or torch._C._len_torch_dispatch_stack()) and all(
        x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter) for x in tensors
    )


def _is_transformed() -> bool:
    return torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, with oneDNN where that is faster."""
    if not suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Linear.apply(x, weight, bias)
    return _onednn_linear(x, weight, bias)


def add_linear(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``out + x @ weight.T`` of matrices, maybe in place of ``out``; without gradients."""
    if suits_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise.binary(x, out, weight, None, "add")
    return out.addmm_(x, weight.T)


def suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies these faster: large and float32, on the processors where it does."""
    return (
        not _is_transformed()  # before sizes, of which the compiler would take note
        and x.numel() * len(weight) >= SMALLEST
        and x.dtype == weight.dtype == torch.float32
        and is_plain(x, weight)
        and not torch.is_autocast_enabled("cpu")
        and prefers_onednn()
    )


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    left = x.reshape(-1, x.shape[-1])
    if 1 not in left.stride() or 0 in left.stride():
        left = left.contiguous()
    if not weight.is_contiguous() and not weight.T.is_contiguous():  # oneDNN would take a thousand times as long
        weight = weight.contiguous()
    product = torch.ops.mkldnn._linear_pointwise.default(left, weight, bias, activation, [], "none")
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
        return (
            linear(grad, weight.T) if needs_x else None,
            _weight_grad(grad, x) if needs_weight else None,
            grad.flatten(0, -2).sum(0) if needs_bias else None,
        )


def _weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of a linear layer's weight."""
    return linear(grad.reshape(-1, grad.shape[-1]).T, x.reshape(-1, x.shape[-1]).T)


def through(module: nn.Module, x: Tensor) -> Tensor:
    """Call a linear layer. One that nobody touched is computed by :func:`linear`.

    Layers stay of the very type ``torch.nn.Linear``, by which quantisation and adapters find them.
    """
    if type(module) is nn.Linear and suits_onednn(x, module.weight) and untouched(module):
        return linear(x, module.weight, module.bias)
    return module(x)


def through_gelu(module: nn.Module, x: Tensor) -> Tensor:
    """GELU of a linear layer's output, in one operation where no backward pass is to come."""
    if torch.is_grad_enabled() or type(module) is not nn.Linear:
        return F.gelu(through(module, x))
    if suits_onednn(x, module.weight) and untouched(module):
        return _onednn_linear(x, module.weight, module.bias, "gelu")
    return F.gelu(module(x))


def convolve_by_products(x: Tensor, conv: nn.Conv1d, chunk: int = 16) -> Tensor:
    """A grouped convolution over time that keeps the number of frames, as one batched product over the groups.

    Each chunk of frames, with what the kernel sees around it, is multiplied by the kernel expanded to a Toeplitz
    matrix: more operations, by ``(chunk + kernel - 1) / kernel``, in a form in which a GPU is fast.

    Args:
        x: (B, C, T).
        conv: One that keeps the frames.
        chunk: Frames that are computed together.

    Returns:
        (B, C', T), without the additional frame of an even kernel.
    """
    weight = conv.weight
    batch, channels, frames = x.shape
    groups, kernel, outputs = conv.groups, weight.shape[2], weight.shape[0]
    chunks, size = -(-frames // chunk), chunk + kernel - 1
    x = F.pad(x, (kernel // 2, chunks * chunk - frames + kernel - 1 - kernel // 2)).unfold(2, size, chunk)
    seen = x.unflatten(1, (groups, -1)).permute(1, 0, 3, 4, 2).reshape(groups, batch * chunks, -1)
    taps = weight.unflatten(0, (groups, -1)).permute(0, 3, 2, 1)  # (G, kernel, C / G, C' / G)
    expanded = torch.stack([F.pad(taps, (0, 0, 0, 0, i, chunk - 1 - i)) for i in range(chunk)], dim=3)
    out = torch.bmm(seen, expanded.reshape(groups, size * channels // groups, -1))
    out = out.view(groups, batch, chunks, chunk, -1).permute(1, 0, 4, 2, 3).reshape(batch, outputs, -1)[..., :frames]
    return out if conv.bias is None else out + conv.bias.unsqueeze(1)


# ------------------------------------------------------------------------------------------- for training on a CPU


def keeps_frames(conv: nn.Module) -> TypeGuard[nn.Conv1d]:
    """Whether a module is a convolution of stride 1, padded by half of its kernel, that nobody touched."""
    return (
        type(conv) is nn.Conv1d
        and untouched(conv)
        and (conv.stride, conv.dilation, conv.padding_mode) == ((1,), (1,), "zeros")
        and conv.padding == (conv.weight.shape[2] // 2,)
    )


def convolve(x: Tensor, conv: nn.Module) -> Tensor:
    """Call a grouped convolution. In bfloat16, one that keeps frames gets a backward pass that takes half the time."""
    if not (is_lean(x) and keeps_frames(conv)):
        return conv(x)
    x, bias = _autocast(x), None if conv.bias is None else _autocast(conv.bias)
    if x.dtype != torch.bfloat16 or not multiplies_fast(x.dtype):
        return conv(x)
    return _GroupedConv.apply(x, _autocast(conv.weight), bias, conv.padding[0], conv.groups)


class _GroupedConv(torch.autograd.Function):
    """:func:`convolve`: the gradient of the input is a convolution, too, that of the weight a product of each group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.groups = padding, groups
        return F.conv1d(x, weight, bias, padding=padding, groups=groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        groups, kernel = ctx.groups, weight.shape[2]
        flipped = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2)
        grad_x = F.conv1d(grad, flipped, padding=kernel - 1 - ctx.padding, groups=groups)
        rows = F.pad(x.transpose(1, 2), (0, 0, ctx.padding, ctx.padding)).unflatten(2, (groups, -1)).permute(2, 0, 1, 3)
        windows = rows.contiguous().unfold(2, kernel, 1).mT  # (G, B, T, K, C)
        outputs = grad.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)  # (G, O, B * T)
        # Group by group, as the windows of one fit in a cache.
        grads = [out @ seen.flatten(0, 1).flatten(1) for out, seen in zip(outputs, windows, strict=True)]
        grad_weight = torch.cat(grads).unflatten(1, (kernel, -1)).transpose(1, 2)
        return grad_x, grad_weight, grad.sum((0, 2)) if ctx.needs_input_grad[2] else None, None, None


def is_lean(x: Tensor) -> bool:
    """Whether to use these operations: in eager mode on a CPU, with a backward pass to come."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not _is_transformed()


def draw_kept(shape: Sequence[int], p: float) -> tuple[Tensor, float]:
    """Draw what dropout keeps, from 8 random bits per element: ``bernoulli_`` takes many times as long.

    The threshold of those bits is rounded up or down at random for each row, so that the probability is exact.

    Args:
        shape: Of the result.
        p: Probability to drop, strictly between 0 and 1; at most 255 / 256.

    Returns:
        int8, 1 where an element is kept and 0 elsewhere, and the factor that keeps the expected value. (Multiplying by
        int8 is vectorised; ``masked_fill`` is not and takes eight times as long.)
    """
    p, count = min(p, 255 / 256), math.prod(shape)
    whole, rest = divmod(256 * p, 1)
    words = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    thresholds = torch.empty(*shape[:-1], 1, dtype=torch.int8).bernoulli_(rest).add_(int(whole) - 128)
    kept = torch.empty(*shape, dtype=torch.int8)
    torch.ge(words.view(torch.int8)[:count].view(*shape), thresholds, out=kept)
    return kept, 1 / (1 - p)


@known
class Dropout(nn.Dropout):
    """``torch.nn.Dropout``."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Any shape to the same."""
        if not self.training or not 0 < self.p < 1 or not is_lean(input):
            return super().forward(input)
        kept, scale = draw_kept(input.shape, self.p)
        return input * scale * kept


def feeds_forward(first: nn.Module, dropout: nn.Module, second: nn.Module, x: Tensor) -> bool:
    """Whether :func:`feed_forward` gives what these modules would."""
    return (
        type(first) is nn.Linear
        and type(dropout) is Dropout
        and type(second) is nn.Linear
        and dropout.p < 1
        and is_lean(x)
        and untouched(first, dropout, second)
    )


def feed_forward(first: nn.Linear, dropout: nn.Dropout, second: nn.Linear, x: Tensor) -> Tensor:
    """Linear, GELU, dropout, linear, with a backward pass that computes GELU again instead of keeping its output."""
    tensors = [t if t is None else _autocast(t) for t in (x, first.weight, first.bias, second.weight, second.bias)]
    with without_autocast(x):
        return _FeedForward.apply(*tensors, dropout.p if dropout.training else 0.0)


class _FeedForward(torch.autograd.Function):
    """:func:`feed_forward`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, weight2: Tensor, bias2: Tensor | None, dropout: float
    ) -> Tensor:
        hidden = linear(x, weight, bias)
        kept, ctx.scale = draw_kept(hidden.shape, dropout) if dropout > 0 else (None, 1.0)
        ctx.save_for_backward(x, hidden, kept, weight, weight2)
        active = F.gelu(hidden)
        if kept is not None:
            active.mul_(ctx.scale).mul_(kept)
        return linear(active, weight2, bias2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, kept, weight, weight2 = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_weight2, needs_bias2, _ = ctx.needs_input_grad
        grad_bias2 = grad.flatten(0, -2).sum(0) if needs_bias2 else None
        active = F.gelu(hidden)
        if kept is not None:
            active.mul_(kept)
            grad = grad * ctx.scale
        grad_weight2 = _weight_grad(grad, active) if needs_weight2 else None
        del active
        grad_hidden = linear(grad, weight2.T)
        if kept is not None:
            grad_hidden.mul_(kept)
        torch.ops.aten.gelu_backward.grad_input(grad_hidden, hidden, grad_input=grad_hidden)
        return (
            linear(grad_hidden, weight.T) if needs_x else None,
            _weight_grad(grad_hidden, x) if needs_weight else None,
            grad_hidden.flatten(0, -2).sum(0) if needs_bias else None,
            grad_weight2,
            grad_bias2,
            None,
        )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """``scaled_dot_product_attention``.

    PyTorch's materialises the weights of all heads several times if there is dropout, and keeps them for the backward
    pass. This one computes the weights of a few heads at a time, and again in the backward pass. Large products go to
    oneDNN: in float32 head by head, in bfloat16 as a batch of several heads.

    Args:
        q: (B, H, T, D), like ``k`` and ``v``.
        k: See ``q``.
        v: See ``q``.
        mask: Boolean, True where to attend, broadcastable to (B, 1, T, T).
        dropout: Probability to drop a weight.

    Returns:
        (B, H, T, D).
    """
    drops, (batch, heads, frames, dim) = 0 < dropout < 1, q.shape
    smallest = SMALLEST if q.dtype == torch.float32 else SMALLEST_BATCHED
    faster = frames * frames * dim >= smallest and multiplies_fast(q.dtype) and is_plain(q, k, v)
    if not (faster or (drops and is_lean(q))) or (dropout > 0 and not drops):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    by_head = faster and q.dtype == torch.float32  # batched products are MKL's; those of bfloat16 are oneDNN's
    together = 0 if by_head else max(1, WEIGHTS_AT_A_TIME // frames**2)
    added = -frames % PADDED if q.dtype == torch.bfloat16 else 0
    kept, scale = draw_kept((batch * heads, frames, frames + added), dropout) if drops else (None, 1.0)
    bias = alive = None
    if mask is not None:
        mask = mask.expand(batch, heads, mask.shape[-2], frames).flatten(0, 1)
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, torch.finfo(q.dtype).min)
        alive = mask.any(-1, keepdim=True).to(torch.int8)  # the weights of a row without any key are zero
    q, k, v = (x.flatten(0, 1).contiguous() for x in (q, k, v))
    if added:
        k, v = F.pad(k, (0, 0, 0, added)), F.pad(v, (0, 0, 0, added))
    out = _Attention.apply(q * dim**-0.5, k, v * scale if drops else v, kept, bias, alive, together)
    return out.unflatten(0, (batch, heads))


class _Attention(torch.autograd.Function):
    """Attention of queries that are scaled already, which keeps no weights. All inputs are (B * H, T, ...)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept: Tensor | None,
        bias: Tensor | None,
        alive: Tensor | None,
        together: int,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, kept, bias, alive)
        ctx.together = together
        out = torch.empty_like(q)
        step = q.shape[1] if together else max(1, WEIGHTS_AT_A_TIME // 4 // q.shape[1])
        for i in _parts(len(q), together):
            for start in range(0, q.shape[1], step):
                part = (i, slice(start, start + step))
                factors = [x if x is None else x[i if x.shape[1] == 1 else part] for x in (bias, alive, kept)]
                _, weights = _weights(q[part], k[i], q.shape[1], *factors)
                out[part] = _times(weights, v[i])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *others = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        grad = grad.contiguous()
        for i in _parts(len(q), ctx.together):
            bias, alive, kept = (None if x is None else x[i] for x in (others[1], others[2], others[0]))
            softmax, weights = _weights(q[i], k[i], q.shape[1], bias, alive, kept)
            grads[2][i] = _times(weights.mT, grad[i])
            grad_weights = _times(grad[i], v[i].mT)
            for factor in (alive, kept):
                if factor is not None:
                    grad_weights.mul_(factor)
            scores = torch._softmax_backward_data(grad_weights, softmax, -1, softmax.dtype)
            grads[0][i], grads[1][i] = _times(scores, k[i]), _times(scores.mT, q[i])
        return *grads, None, None, None, None


def _parts(count: int, together: int) -> Sequence[Any]:
    """Indices of single heads, or slices of several."""
    return [slice(i, i + together) for i in range(0, count, together)] if together else range(count)


def _weights(
    q: Tensor, k: Tensor, num_keys: int, bias: Tensor | None, alive: Tensor | None, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention weights before and after masking and dropout."""
    scores = _times(q, k.mT)
    if bias is not None:
        scores[..., : bias.shape[-1]] += bias
    if scores.shape[-1] > num_keys:
        scores[..., num_keys:] = -torch.inf
    softmax = scores.softmax(-1)
    weights = softmax
    for factor in (alive, kept):
        if factor is not None:
            weights = weights * factor
    return softmax, weights


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Products of several matrices by PyTorch, of two by oneDNN."""
    return a @ b if a.ndim > 2 else _onednn_linear(a, b.mT, None)


# ----------------------------------------------------------------------------------------- the feature extractor
#
# Channels-last: a convolution of kernel k and stride s is ⌈k/s⌉ matrix products on strided views of its input. Nothing
# is unfolded or transposed, and each norm reads contiguous rows. The utterances of a batch lie one after the other in
# one (rows, channels) matrix, each padded to a number of rows that all strides divide. Outputs whose kernel would reach
# into the next utterance are computed with the rest and left out at the end.

ConvShapes = Sequence[tuple[int, int, int]]


def _strided_conv(frames: Tensor, taps: Tensor, stride: int) -> Tensor:
    """Convolve (rows * stride, C) frames with taps (kernel * C, O) to (rows, O).

    The last outputs, whose kernel passes the last frame, lack the taps that find nothing.
    """
    groups = frames.view(-1, stride * frames.shape[1])
    first, *rest = taps.split(groups.shape[1])
    out = linear(groups[:, : first.shape[0]], first.T)
    for shift, part in enumerate(rest, start=1):
        out = add_linear(out, _shifted(groups, shift, part.shape[0]), part.T)
    return out


def _shifted(groups: Tensor, shift: int, width: int) -> Tensor:
    """The first columns of the rows that come ``shift`` later; zeros where there are none."""
    shifted = groups.new_empty(len(groups), width)
    shifted[:-shift] = groups[shift:, :width]
    shifted[-shift:] = 0
    return shifted


def _strided_conv_backward(
    grad: Tensor, frames: Tensor, taps: Tensor, stride: int, *, needs_frames: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients for frames, if needed, and taps."""
    groups = frames.view(-1, stride * frames.shape[1])
    first, *rest = taps.split(groups.shape[1])
    seen = [groups[:, : len(first)], *(_shifted(groups, i, len(part)) for i, part in enumerate(rest, start=1))]
    if len(taps) < grad.shape[1]:  # oneDNN copies a transposed left factor: better the narrower one
        grad_taps = torch.cat([linear(x.T, grad.T) for x in seen])
    else:
        transposed = grad.T.contiguous()
        grad_taps = torch.cat([linear(transposed, x.T) for x in seen], dim=1).T
    if not needs_frames:
        return None, grad_taps
    grad_groups = linear(grad, first)
    if first.shape[0] < groups.shape[1]:  # the kernel is smaller than the stride: frames in between have no gradient
        grad_groups = F.pad(grad_groups, (0, groups.shape[1] - first.shape[0]))
    for shift, part in enumerate(rest, start=1):
        grad_groups[shift:, : part.shape[0]] += linear(grad[:-shift], part)
    return grad_groups.view_as(frames), grad_taps


class _Conv(torch.autograd.Function):
    """:func:`_strided_conv` of frames, or of ``gelu(layer_norm(frames))``: that keeps one tensor instead of three.

    ``first``: the frames are themselves products, ``source @ first``, cheap to compute and the largest tensor of the
    model (6.5 MB for each second of speech), so they are not kept either.
    """

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        first: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        taps: Tensor,
        stride: int,
    ) -> Tensor:
        ctx.save_for_backward(source, first, weight, bias, taps)
        ctx.eps, ctx.stride = eps, stride
        frames = source if first is None else linear(source, first.T)
        if weight is not None:
            frames = F.gelu(F.layer_norm(frames, weight.shape, weight, bias, eps))
        return _strided_conv(frames, taps, stride)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        source, first, weight, bias, taps = ctx.saved_tensors
        frames = source if first is None else linear(source, first.T)
        grad: Any
        grad_weight = grad_bias = grad_first = None
        if weight is None:
            needs = ctx.needs_input_grad[0]
            grad, grad_taps = _strided_conv_backward(grads[0], frames, taps, ctx.stride, needs_frames=needs)
        else:
            normed, mean, rstd = torch.native_layer_norm(frames, weight.shape, weight, bias, ctx.eps)
            grad, grad_taps = _strided_conv_backward(grads[0], F.gelu(normed), taps, ctx.stride, needs_frames=True)
            torch.ops.aten.gelu_backward.grad_input(grad, normed, grad_input=grad)
            del normed  # it is large
            grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
                grad, frames, weight.shape, mean, rstd, weight, bias, [True, True, True]
            )
        if first is not None:
            grad_first = linear(source.T, grad.T)
            grad = linear(grad, first) if ctx.needs_input_grad[0] else None
        return grad, grad_first, grad_weight, grad_bias, None, grad_taps, None


@dataclass(frozen=True)
class Moments:
    """Number (B, 1, 1), mean and variance (B, 1, C) of each channel's values in each utterance, float32 at least."""

    count: Tensor
    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, frames: Tensor, valid: Tensor) -> Self:
        """Over the ``valid`` (B, R) of the frames (B, R, C)."""
        frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
        weight = valid.unsqueeze(-1).to(frames.dtype)
        count = weight.sum(1, keepdim=True)
        divisor = count.clamp(min=1)
        mean = (frames * weight).sum(1, keepdim=True) / divisor
        return cls(count, mean, ((frames - mean).square() * weight).sum(1, keepdim=True) / divisor)

    def joined(self, other: Self) -> Self:
        """Over the values of both (Chan, Golub, LeVeque 1979)."""
        count = (self.count + other.count).clamp(min=1)
        share, delta = other.count / count, other.mean - self.mean
        var = (1 - share) * self.var + share * other.var + (1 - share) * share * delta.square()
        return type(self)(self.count + other.count, self.mean + share * delta, var)

    def normalise(self, frames: Tensor, norm: nn.GroupNorm) -> Tensor:
        """Give each channel of (B, R, C) mean 0 and variance 1, then scale and shift it."""
        scale = torch.rsqrt(self.var + norm.eps) * norm.weight
        return torch.addcmul(norm.bias, frames.to(self.mean.dtype) - self.mean, scale).to(frames.dtype)


class _GroupNorm(torch.autograd.Function):
    """``Moments.of(rows[:, :count]).normalise(rows)``, keeping one tensor instead of seven."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, eps: float, count: int) -> Tensor:
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        mean = wide[:, :count].mean(1, keepdim=True)
        centred = wide - mean if wide is rows else wide.sub_(mean)
        # In place and in parts: malloc gives blocks of this size back, and clearing their pages takes longest.
        squares = [part.square().sum(1, keepdim=True) for part in centred[:, :count].split(ROWS_AT_A_TIME, 1)]
        rstd = torch.rsqrt(torch.stack(squares).sum(0) / count + eps)
        ctx.save_for_backward(rows, mean, rstd, weight)
        ctx.count = count
        return torch.addcmul(bias, centred, rstd * weight, out=centred).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, mean, rstd, weight = ctx.saved_tensors
        parts = list(zip(rows.split(ROWS_AT_A_TIME, 1), grad.split(ROWS_AT_A_TIME, 1), strict=True))
        total = torch.stack([part.sum(1, keepdim=True, dtype=mean.dtype) for _, part in parts]).sum(0)
        along = rstd * torch.stack([((x - mean) * part).sum(1, keepdim=True) for x, part in parts]).sum(0)
        scale = rstd * weight
        shift, slope = scale * total / -ctx.count, scale * rstd * along / -ctx.count
        grad_rows = torch.empty_like(rows)
        for into, (x, part) in zip(grad_rows.split(ROWS_AT_A_TIME, 1), parts, strict=True):
            into.copy_(torch.addcmul(shift, x - mean, slope).addcmul_(part, scale))
        grad_rows[:, ctx.count :] = grad[:, ctx.count :] * scale  # these rows are not in the statistics
        return grad_rows, along.sum((0, 1)), total.sum((0, 1)), None, None


def conv_shapes(convs: Iterable[nn.Conv1d]) -> list[tuple[int, int, int]]:
    """(out_channels, kernel, stride) of convolutions, as they are now."""
    return [(conv.weight.shape[0], conv.weight.shape[2], conv.stride[0]) for conv in convs]


class _Block:
    """Weights of a convolution block, and its products on rows."""

    def __init__(self, layer: nn.Module) -> None:
        conv = cast("nn.Conv1d", layer.conv)
        self.bias, self.norm = conv.bias, cast("nn.Module | None", layer.layer_norm)
        (self.shape,) = conv_shapes([conv])
        self.stride = self.shape[2]
        self.taps = _autocast(conv.weight.permute(2, 1, 0).flatten(0, 1))
        """The kernel as the right factor of products, (kernel * C, O)."""

    def convolve(
        self, frames: Tensor, stride: int, norm: nn.LayerNorm | None = None, before: Self | None = None
    ) -> Tensor:
        """Convolve the rows of all utterances, (B * R * stride, C) to (B * R, O).

        Args:
            frames: The rows.
            stride: Of the convolution.
            norm: A LayerNorm whose output goes through GELU and is convolved.
            before: A block without bias whose convolution of ``frames`` is what is normalised.
        """
        taps = None if before is None else before.taps
        weight, bias, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
        out: Tensor = _Conv.apply(_autocast(frames), taps, weight, bias, eps, self.taps, stride)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def can_extract(layers: Sequence[nn.Module]) -> bool:
    """Whether :func:`extract` gives what the convolution blocks would."""
    if torch.compiler.is_exporting() or not untouched(*layers):  # an exported graph would be full of copies
        return False
    for index, layer in enumerate(layers):
        conv, norm = getattr(layer, "conv", None), cast("Any", layer).layer_norm
        if not isinstance(conv, nn.Conv1d):
            return False
        if (conv.padding, conv.dilation, conv.groups, conv.padding_mode) != ((0,), (1,), 1, "zeros"):
            return False
        if isinstance(norm, nn.GroupNorm):
            if index > 0 or norm.num_groups != norm.num_channels or norm.weight is None:
                return False
        elif norm is not None and (
            not isinstance(norm, nn.LayerNorm)
            or type(norm) is nn.LayerNorm  # which normalises over time here
            or norm.weight is None
            or norm.bias is None
        ):
            return False
    return True


def extract(
    layers: Sequence[nn.Module], waveforms: Tensor, lengths: Tensor | None = None, moments: Moments | None = None
) -> Tensor:
    """Run the convolution blocks on waveforms.

    Args:
        layers: Blocks that :func:`can_extract` accepts.
        waveforms: (B, S).
        lengths: Samples that count in the statistics of a group norm, (B,).
        moments: The group norm's statistics, if they are known already.

    Returns:
        (B, T, C).
    """
    blocks = [_Block(layer) for layer in layers]
    if any(isinstance(block.norm, nn.GroupNorm) for block in blocks):
        return _extract(blocks, waveforms, lengths, moments)
    parts = [_extract(blocks, piece) for piece in _pieces(waveforms, blocks)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.flatten(0, 1) for part in parts]).unflatten(0, (len(waveforms), -1))


def _pieces(waveforms: Tensor, blocks: Sequence[_Block]) -> Iterator[Tensor]:
    """Parts of a batch, one utterance after the other, whose frames together are the frames of the batch."""
    samples, on_cpu = waveforms.shape[1], waveforms.device.type == "cpu"
    limit = CPU_SAMPLES * 4 // blocks[0].taps.itemsize if on_cpu else SAMPLES
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and not on_cpu):
        yield waveforms
        return
    if samples <= limit:
        yield from waveforms.split(limit // samples)
        return
    shapes = [block.shape for block in blocks]
    hop, field = math.prod(stride for _, _, stride in shapes), receptive_field(shapes)
    frames = conv_length(shapes, samples)
    count = -(-frames // max(1, limit // hop))
    for row in waveforms.split(1):
        for i in range(count):
            start, stop = frames * i // count, frames * (i + 1) // count
            yield row[:, start * hop : (stop - 1) * hop + field]


def _extract(
    blocks: Sequence[_Block], waveforms: Tensor, lengths: Tensor | None = None, moments: Moments | None = None
) -> Tensor:
    """:func:`extract` at once."""
    batch, samples = waveforms.shape
    shapes = [block.shape for block in blocks]
    frames = _first_rows(waveforms, shapes)
    if is_lean(frames) and all(isinstance(block.norm, nn.LayerNorm) for block in blocks):
        frames = _extract_lean(blocks, frames)
    else:
        for index, block in enumerate(blocks):
            frames = block.convolve(frames, block.stride if index else 1)
            if isinstance(block.norm, nn.GroupNorm):
                rows, norm = frames.unflatten(0, (batch, -1)), block.norm
                if moments is None and lengths is None and waveforms.device.type == "cpu" and not _is_transformed():
                    count = conv_length(shapes[:1], samples)
                    rows = _GroupNorm.apply(rows, norm.weight, norm.bias, norm.eps, count)
                else:
                    if moments is None:
                        moments = Moments.of(rows, valid_rows(waveforms, lengths, shapes[0], rows.shape[1]))
                    rows = moments.normalise(rows, norm)
                frames = rows.flatten(0, 1)
            elif block.norm is not None:
                frames = _layer_norm(frames, cast("nn.LayerNorm", block.norm))
            frames = F.gelu(frames)
    return frames.view(batch, -1, frames.shape[1])[:, : conv_length(shapes, samples)]


def first_conv(layer: nn.Module, waveforms: Tensor) -> Tensor:
    """Output of the first convolution, before its norm, (B, R, C)."""
    block = _Block(layer)
    return block.convolve(_first_rows(waveforms, [block.shape]), 1).unflatten(0, (len(waveforms), -1))


def valid_rows(waveforms: Tensor, lengths: Tensor | None, shape: tuple[int, int, int], num_rows: int) -> Tensor:
    """Which outputs of the first convolution belong to each utterance, (B, R)."""
    batch, samples = waveforms.shape
    counted = torch.full((batch,), samples, device=waveforms.device) if lengths is None else lengths
    return torch.arange(num_rows, device=waveforms.device) < conv_length([shape], counted).unsqueeze(1)


def _first_rows(waveforms: Tensor, shapes: ConvShapes) -> Tensor:
    """The samples under each output of the first convolution, (B * R, kernel), R a multiple of the other strides."""
    batch, samples = waveforms.shape
    _, kernel, stride = shapes[0]
    multiple = math.prod([stride for _, _, stride in shapes[1:]])  # a list, for torch.compile
    rows = -(-conv_length(shapes[:1], samples) // multiple) * multiple
    # One channel: a matrix product over a whole kernel beats one over `stride` samples, and the copy is small.
    kernels = F.pad(waveforms, (0, max(0, (rows - 1) * stride + kernel - samples))).unfold(1, kernel, stride)
    return kernels[:, :rows].reshape(batch * rows, kernel)


def _extract_lean(blocks: Sequence[_Block], kernels: Tensor) -> Tensor:
    """All blocks. Each LayerNorm and GELU but the last belongs to the convolution that follows."""
    first, *others = blocks
    if others and first.bias is None:
        second, *others = others
        frames = second.convolve(kernels, second.stride, cast("nn.LayerNorm", first.norm), first)
        norm = second.norm
    else:
        frames, norm = first.convolve(kernels, 1), first.norm
    for block in others:
        frames, norm = block.convolve(frames, block.stride, cast("nn.LayerNorm", norm)), block.norm
    return F.gelu(_layer_norm(frames, cast("nn.LayerNorm", norm)))


def _layer_norm(rows: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _autocast(x: Tensor) -> Tensor:
    """In the type that autocast gives to matrix products, as operations of ours are unknown to it."""
    device = x.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if enabled else x


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Compute in the types that tensors have."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)

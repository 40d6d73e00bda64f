"""Fast operations of our own, and the rule for when they may replace modules.

There are two kinds: matrix products by the faster library, and operations that save time and memory in training on a
CPU, since on GPUs and in compiled code PyTorch's own are better.
"""

import math
import os
import platform
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_module

from spidr.tools.errors import InputError

ONEDNN_SETTING = "SPIDR_ONEDNN"
"""Environment variable: 1 computes float32 products with oneDNN, 0 with PyTorch's own. Unset: a rule decides."""

SMALLEST = 1 << 22
"""Multiplications below which a product is PyTorch's: calling oneDNN takes 13 µs more than calling MKL."""

PADDED = 32
"""Keys are padded to a multiple of this in bfloat16: softmax is slow on the rest of a row that fills no vector."""

WIDE = 128
"""Width of a model from which oneDNN is the faster library for all its products."""

NARROW = 16
"""Channels of a group below which a convolution leaves vectors of the processor partly empty."""

FEW = 1 << 14
"""Input elements below which expanding a kernel of such groups takes longer than convolving with it."""

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


# ------------------------------------------------------------------------------------------- the process's switches

_lock = threading.Lock()
_users = {"cuda": 0, "cpu": 0}
_before: dict[str, list[tuple[Any, str, Any]]] = {}
_thread = threading.local()


def exact_products(device: torch.device, width: int | None = None) -> AbstractContextManager[None]:
    """Compute float32 products and convolutions in float32, not in TF32, so that a GPU gives what a CPU gives.

    On a CPU, all products of a model of this ``width`` go to one library, the faster one, whatever other threads do.
    The switches are the process's: the first of several threads sets them, the last one restores them.
    """
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return _switched("cuda")
    if device.type == "cpu" and width is not None and not _is_transformed() and prefers_onednn_for_all():
        return _switched("cpu") if width >= WIDE else _unswitched()
    return nullcontext()


def fast_products(x: Tensor) -> AbstractContextManager[None]:
    """Compute large products of ``x``, within an operation of ours on a CPU, by the faster library."""
    narrow = getattr(_thread, "narrow", False)
    return _switched("cpu") if is_plain(x) and prefers_onednn_for_all() and not narrow else nullcontext()


@contextmanager
def _switched(kind: str) -> Iterator[None]:
    with _lock:
        _users[kind] += 1
        if _users[kind] == 1:
            _before[kind] = _switch(_switches(kind))
    try:
        yield
    finally:
        with _lock:
            _users[kind] -= 1
            if _users[kind] == 0:
                _switch(_before.pop(kind))


@contextmanager
def _unswitched() -> Iterator[None]:
    """Let no operation of ours in this thread use the switch, as small products cost more to start than to compute."""
    before, _thread.narrow = getattr(_thread, "narrow", False), True
    try:
        yield
    finally:
        _thread.narrow = before


def _switch(switches: list[tuple[Any, str, Any]]) -> list[tuple[Any, str, Any]]:
    """Change settings (where, name, value); returns them with the values they had."""
    before = [(where, name, getattr(where, name)) for where, name, _ in switches]
    for where, name, value in switches:
        setattr(where, name, value)
    return before


def _switches(kind: str) -> list[tuple[Any, str, Any]]:
    """What changes on a kind of device."""
    if kind == "cpu":
        return [(cast("Any", torch.backends.mkldnn).matmul, "fp32_precision", "bf16")]
    matmul, cudnn = torch.backends.cuda.matmul, cast("Any", torch.backends.cudnn)
    if hasattr(matmul, "fp32_precision"):  # from torch 2.9 on, where the older switches warn
        return [(matmul, "fp32_precision", "ieee"), (cudnn.conv, "fp32_precision", "ieee")]
    return [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]


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


@cache
def prefers_onednn_for_all() -> bool:
    """Whether PyTorch's switch may hand all float32 products to oneDNN, batches and transposed factors included.

    The switch (of torch 2.9 and newer) allows bfloat16 in them, which oneDNN makes use of on processors with AMX.
    """
    if not hasattr(torch.backends.mkldnn, "matmul") or not prefers_onednn() or torch.cpu._is_amx_tile_supported():
        return False
    a = (torch.arange(64 * 16, device="cpu") * 37 % 2047 - 1023).view(64, 16)  # 11 bits; bfloat16 has 8
    before = _switch(_switches("cpu"))
    try:
        with torch.autocast("cpu", enabled=False):
            return torch.equal(a.float() @ a.float().T, (a @ a.T).float())
    finally:
        _switch(before)


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
            weight_grad(grad, x) if needs_weight else None,
            grad.flatten(0, -2).sum(0) if needs_bias else None,
        )


def weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of a linear layer's weight."""
    with fast_products(grad):
        return grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])


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
        return gelu_linear(x, module.weight, module.bias)
    return F.gelu(module(x))


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of :func:`linear`, without gradients."""
    return _onednn_linear(x, weight, bias, "gelu") if suits_onednn(x, weight) else F.gelu(F.linear(x, weight, bias))


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
    """Call a grouped convolution, (B, C, T) to (B, C', T'). One that keeps frames is faster with channels last."""
    if not (is_plain(x) and keeps_frames(conv)):
        return conv(x)
    x, weight, bias = autocast(x), autocast(conv.weight), None if conv.bias is None else autocast(conv.bias)
    if not multiplies_fast(x.dtype):
        return conv(x)
    convolution = _GroupedConv.apply if is_lean(x) else _convolve_last
    return convolution(x, weight, bias, int(conv.padding[0]), conv.groups)


def _convolve_last(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int) -> Tensor:
    if weight.shape[1] < NARROW and x.numel() >= FEW:
        return convolve_by_products(x, weight, bias, padding, groups, chunk=4)
    image, kernels = (i.transpose(1, 2).contiguous().transpose(1, 2).unsqueeze(2) for i in (x, weight))
    return F.conv2d(image, kernels, bias, 1, (0, padding), 1, groups).squeeze(2)


def convolve_by_products(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int, *, chunk: int
) -> Tensor:
    """A grouped convolution over time as one batched product over the groups, with its output's channels last.

    Each chunk of frames, with what the kernel sees around it, is multiplied by the kernel expanded to a Toeplitz
    matrix: more operations, by ``(chunk + kernel - 1) / kernel``, in a form in which processors are faster.

    Args:
        x: (B, C, T).
        weight: (C', C / groups, kernel).
        bias: (C',).
        padding: Frames of zeros at each end.
        groups: Groups of channels.
        chunk: Frames that are computed together.

    Returns:
        (B, C', T + 2 * padding - kernel + 1).
    """
    batch, channels, frames = x.shape
    kernel = weight.shape[2]
    count = frames + 2 * padding - kernel + 1
    chunks, size = -(-count // chunk), chunk + kernel - 1
    rows = x.unflatten(1, (groups, -1)).permute(1, 0, 3, 2)  # (G, B, T, C / G)
    rows = F.pad(rows, (0, 0, padding, chunks * chunk + kernel - 1 - frames - padding))
    seen = rows.unfold(2, size, chunk).mT.reshape(groups, batch * chunks, -1)
    taps = weight.unflatten(0, (groups, -1)).permute(0, 3, 2, 1)  # (G, kernel, C / G, C' / G)
    expanded = taps.new_zeros(groups, size, taps.shape[2], chunk, taps.shape[3])
    for i in range(chunk):
        expanded[:, i : i + kernel, :, i] = taps
    with fast_products(x):
        out = seen @ expanded.view(groups, size * channels // groups, -1)
    out = out.view(groups, batch, chunks * chunk, -1)[:, :, :count].permute(1, 2, 0, 3).flatten(2)
    return (out if bias is None else out + bias).transpose(1, 2)


class _GroupedConv(torch.autograd.Function):
    """:func:`convolve`: the gradient of the input is a convolution, too, that of the weight a product of each group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.groups = padding, groups
        return _convolve_last(x, weight, bias, padding, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        groups, kernel = ctx.groups, weight.shape[2]
        flipped = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2)
        grad_x = _convolve_last(grad, flipped, None, kernel - 1 - ctx.padding, groups)
        # With time before the utterances, what a tap sees is one row; group by group, as that of one fits in a cache.
        frames = F.pad(x, (ctx.padding, ctx.padding)).unflatten(1, (groups, -1)).permute(1, 2, 3, 0).contiguous()
        seen = frames.unfold(2, grad.shape[2], 1).permute(0, 2, 1, 4, 3).flatten(3)  # (G, K, C, T * B)
        outputs = grad.unflatten(1, (groups, -1)).permute(1, 3, 0, 2).flatten(1, 2)  # (G, T * B, O)
        with fast_products(x):
            grads = [rows.flatten(0, 1) @ out for rows, out in zip(seen, outputs, strict=True)]
        grad_weight = torch.stack(grads).unflatten(1, (kernel, -1)).permute(0, 3, 2, 1).flatten(0, 1)
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
    tensors = [t if t is None else autocast(t) for t in (x, first.weight, first.bias, second.weight, second.bias)]
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
        grad_weight2 = weight_grad(grad, active) if needs_weight2 else None
        del active
        grad_hidden = linear(grad, weight2.T)
        if kept is not None:
            grad_hidden.mul_(kept)
        torch.ops.aten.gelu_backward.grad_input(grad_hidden, hidden, grad_input=grad_hidden)
        return (
            linear(grad_hidden, weight.T) if needs_x else None,
            weight_grad(grad_hidden, x) if needs_weight else None,
            grad_hidden.flatten(0, -2).sum(0) if needs_bias else None,
            grad_weight2,
            grad_bias2,
            None,
        )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """``scaled_dot_product_attention``.

    PyTorch's materialises the weights of all heads several times if there is dropout, and keeps them for the backward
    pass. This one computes the weights of a few heads at a time, and again in the backward pass.

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
    faster = (
        is_plain(q, k, v)
        and multiplies_fast(q.dtype)
        and (torch.is_grad_enabled() or batch * heads * frames * frames * dim >= SMALLEST)
    )
    if not (faster or (drops and is_lean(q))) or (dropout > 0 and not drops):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
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
    out = _Attention.apply(q * dim**-0.5, k, v * scale if drops else v, kept, bias, alive)
    return out.unflatten(0, (batch, heads))


class _Attention(torch.autograd.Function):
    """Attention of queries that are scaled already, which keeps no weights. All inputs are (B * H, T, ...)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, bias: Tensor | None, alive: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, kept, bias, alive)
        out, rows = torch.empty_like(q), max(1, WEIGHTS_AT_A_TIME // q.shape[1])
        with fast_products(q):
            for i in _parts(q):
                for start in range(0, q.shape[1], rows):
                    part = (i, slice(start, start + rows))
                    factors = [x if x is None else x[i if x.shape[1] == 1 else part] for x in (bias, alive, kept)]
                    _, weights = _weights(q[part], k[i], q.shape[1], *factors)
                    torch.bmm(weights, v[i], out=out[part])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *others = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        grad = grad.contiguous()
        with fast_products(q):
            for i in _parts(q):
                kept, bias, alive = (x if x is None else x[i] for x in others)
                softmax, weights = _weights(q[i], k[i], q.shape[1], bias, alive, kept)
                torch.bmm(weights.mT, grad[i], out=grad_v[i])
                grad_weights = grad[i] @ v[i].mT
                for factor in (alive, kept):
                    if factor is not None:
                        grad_weights.mul_(factor)
                scores = torch._softmax_backward_data(grad_weights, softmax, -1, softmax.dtype)
                torch.bmm(scores, k[i], out=grad_q[i])
                torch.bmm(scores.mT, q[i], out=grad_k[i])
        return grad_q, grad_k, grad_v, None, None, None


def _parts(q: Tensor) -> Iterator[slice]:
    """Heads whose weights are computed together."""
    step = max(1, WEIGHTS_AT_A_TIME // q.shape[1] ** 2)
    return (slice(i, i + step) for i in range(0, len(q), step))


def _weights(
    q: Tensor, k: Tensor, num_keys: int, bias: Tensor | None, alive: Tensor | None, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention weights before and after masking and dropout."""
    scores = q @ k.mT
    if bias is not None:
        scores[..., :num_keys] += bias
    if k.shape[1] > num_keys:
        scores[..., num_keys:] = -torch.inf
    softmax = scores.softmax(-1)
    weights = softmax
    for factor in (alive, kept):
        if factor is not None:
            weights = weights * factor
    return softmax, weights


def autocast(x: Tensor) -> Tensor:
    """In the type that autocast gives to matrix products, as operations of ours are unknown to it."""
    device = x.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if enabled else x


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Compute in the types that tensors have."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)

"""The feature extractor's convolution blocks, on rows.

Channels-last: each norm reads contiguous rows, and nothing is transposed. The utterances of a batch lie one after the
other in one (rows, channels) matrix, each padded to a number of rows that all strides divide. Outputs whose kernel
would reach into the next utterance are computed with the rest and left out at the end. Where oneDNN is the faster
library, it convolves such rows as they are; elsewhere, a convolution of kernel k and stride s is ⌈k/s⌉ products of
strided views of its input.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spidr.models.kernels import (
    autocast,
    fast_products,
    gelu_linear,
    is_lean,
    is_plain,
    linear,
    multiplies_fast,
    untouched,
    weight_grad,
    without_autocast,
)
from spidr.tools.frames import conv_length, receptive_field

SAMPLES = 320_000
"""Samples that are convolved at a time without gradients: the first layer's output of an hour would fill 24 GB."""

CPU_BYTES = 26_000_000
"""Size of the first layer's output that is computed at a time on CPUs, with gradients too: malloc keeps such a block,
while glibc gives one of more than 32 MB back at once, and the kernel takes long to clear as many pages again."""

ConvShapes = Sequence[tuple[int, int, int]]


def _strided_conv(frames: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """Convolve (rows * stride, C) frames with a kernel (O, taps * C) to (rows, O).

    The last outputs, whose kernel passes the last frame, lack the taps that find nothing.
    """
    overlap = _overlap(frames, kernel, stride)
    if overlap and is_plain(frames) and multiplies_fast(frames.dtype):
        padding = (0, overlap * stride)  # on both sides; the first outputs are left out again
        image = F.conv2d(_image(frames), _image(kernel, frames.shape[1]), None, (1, stride), padding)
        return image[0, :, 0].T[overlap:]
    groups = frames.view(-1, stride * frames.shape[1])
    first, *rest = kernel.split(groups.shape[1], dim=1)
    out = linear(groups[:, : first.shape[1]], first)
    for shift, part in enumerate(rest, start=1):
        seen = groups.new_zeros(len(groups), part.shape[1])
        seen[:-shift] = groups[shift:, : part.shape[1]]
        out = out.addmm_(seen, part.T)
    return out


def _overlap(frames: Tensor, kernel: Tensor, stride: int) -> int:
    """How many outputs at the end see more frames than there are."""
    return (kernel.shape[1] // frames.shape[1] - 1) // stride


def _image(rows: Tensor, channels: int | None = None) -> Tensor:
    """Frames as one image of height 1, or a kernel as several, channels-last: (N, C, 1, frames)."""
    images = rows.unsqueeze(0) if channels is None else rows.unflatten(1, (-1, channels))
    return images.mT.unsqueeze(2)


def _strided_conv_backward(
    grad: Tensor, frames: Tensor, kernel: Tensor, stride: int, *, needs_frames: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients for frames, if needed, and kernel."""
    groups = frames.view(-1, stride * frames.shape[1])
    parts = kernel.split(groups.shape[1], dim=1)
    with fast_products(grad):
        grad_kernel = torch.cat(
            [grad[: len(grad) - i].T @ groups[i:, : part.shape[1]] for i, part in enumerate(parts)], dim=1
        )
        if not needs_frames:
            return None, grad_kernel
        grad_groups = grad @ parts[0]
        if grad_groups.shape[1] < groups.shape[1]:  # frames between two kernels have no gradient
            grad_groups = F.pad(grad_groups, (0, groups.shape[1] - grad_groups.shape[1]))
        for i, part in enumerate(parts[1:], start=1):
            grad_groups[i:, : part.shape[1]].addmm_(grad[:-i], part)
    return grad_groups.view_as(frames), grad_kernel


class _Conv(torch.autograd.Function):
    """:func:`_strided_conv` of frames, or of ``gelu(layer_norm(frames))``: that keeps one tensor instead of three.

    ``first``: the frames are themselves products, ``source @ first.T``, cheap to compute and the largest tensor of the
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
        kernel: Tensor,
        stride: int,
    ) -> Tensor:
        ctx.save_for_backward(source, first, weight, bias, kernel)
        ctx.eps, ctx.stride = eps, stride
        frames = source if first is None else linear(source, first)
        if weight is not None:
            frames = F.gelu(F.layer_norm(frames, weight.shape, weight, bias, eps))
        return _strided_conv(frames, kernel, stride)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        source, first, weight, bias, kernel = ctx.saved_tensors
        frames = source if first is None else linear(source, first)
        grad: Any
        grad_weight = grad_bias = grad_first = None
        if weight is None:
            needs = ctx.needs_input_grad[0]
            grad, grad_kernel = _strided_conv_backward(grads[0], frames, kernel, ctx.stride, needs_frames=needs)
        else:
            normed, mean, rstd = torch.native_layer_norm(frames, weight.shape, weight, bias, ctx.eps)
            grad, grad_kernel = _strided_conv_backward(grads[0], F.gelu(normed), kernel, ctx.stride, needs_frames=True)
            torch.ops.aten.gelu_backward.grad_input(grad, normed, grad_input=grad)
            del normed  # it is large
            grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
                grad, frames, weight.shape, mean, rstd, weight, bias, [True, True, True]
            )
        if first is not None:
            grad_first = weight_grad(grad, source)
            grad = linear(grad, first.T) if ctx.needs_input_grad[0] else None
        return grad, grad_first, grad_weight, grad_bias, None, grad_kernel, None


class _FirstConvs(torch.autograd.Function):
    """The first two convolutions of a model with a group norm, ``_strided_conv(gelu(source @ first.mT))``.

    What is in between is not kept, and is computed for one utterance at a time, as that fits in a cache.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, first: Tensor, kernel: Tensor, stride: int) -> Tensor:
        """``source``: (B, R, K), ``first``: (B, O, K)."""
        ctx.save_for_backward(source, first, kernel)
        ctx.stride = stride
        active = (gelu_linear(*pair).to(kernel.dtype) for pair in zip(source, first, strict=True))
        return torch.cat([_strided_conv(frames, kernel, stride) for frames in active])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        source, first, kernel = ctx.saved_tensors
        grads_source, grads_first, grad_kernel = [], [], torch.zeros_like(kernel)
        for rows, weight, part in zip(source, first, grad.unflatten(0, (len(first), -1)), strict=True):
            frames = linear(rows, weight)
            active = F.gelu(frames).to(kernel.dtype)
            grad_active, grad_here = _strided_conv_backward(part, active, kernel, ctx.stride, needs_frames=True)
            grad_kernel += grad_here
            grad_frames = cast("Tensor", grad_active).to(frames.dtype)
            torch.ops.aten.gelu_backward.grad_input(grad_frames, frames, grad_input=grad_frames)
            grads_first.append(weight_grad(grad_frames, rows))
            if ctx.needs_input_grad[0]:
                grads_source.append(linear(grad_frames, weight.T))
        return torch.stack(grads_source) if grads_source else None, torch.stack(grads_first), grad_kernel, None


def gram(waveforms: Tensor, shape: tuple[int, int, int], lengths: Tensor | None = None) -> Tensor:
    """Sums over time from which the mean and the variance of each output of a first convolution follow.

    Args:
        waveforms: (B, S).
        shape: Of the convolution: (out_channels, kernel, stride).
        lengths: Samples that count, (B,).

    Returns:
        ``sum(x x^T)`` over the ``kernel`` samples x under each output, with a 1 appended, (B, kernel + 1, kernel + 1),
        in float64, since the outputs may be a thousand times smaller than the samples. On the CPU for an Apple GPU,
        which has no float64.
    """
    _, kernel, stride = shape
    wide = (waveforms.cpu() if waveforms.device.type == "mps" else waveforms).double()
    seen = wide.unfold(1, kernel, stride)
    exists = seen.new_ones(*seen.shape[:2], 1)
    if lengths is not None:
        exists *= valid_rows(lengths.to(wide.device), shape, seen.shape[1]).unsqueeze(2)
        seen = seen * exists
    sums = exists.mT @ seen
    count = exists.sum(1, keepdim=True)
    return torch.cat([torch.cat([seen.mT @ seen, sums], dim=1), torch.cat([sums.mT, count], dim=1)], dim=2)


def conv_shapes(convs: Iterable[nn.Conv1d]) -> list[tuple[int, int, int]]:
    """(out_channels, kernel, stride) of convolutions, as they are now."""
    return [(conv.weight.shape[0], conv.weight.shape[2], conv.stride[0]) for conv in convs]


class _Block:
    """Weights of a convolution block, and its products on rows."""

    def __init__(self, layer: nn.Module) -> None:
        self.conv = cast("nn.Conv1d", layer.conv)
        self.bias, self.norm = self.conv.bias, cast("nn.Module | None", layer.layer_norm)
        (self.shape,) = conv_shapes([self.conv])
        self.stride = self.shape[2]
        self.kernel = autocast(self.conv.weight.transpose(1, 2).flatten(1))
        """(O, kernel * C)."""

    def convolve(
        self, frames: Tensor, stride: int, norm: nn.Module | None = None, first: Tensor | None = None
    ) -> Tensor:
        """Convolve the rows of all utterances, (B * R * stride, C) to (B * R, O).

        Args:
            frames: The rows.
            stride: Of the convolution.
            norm: A LayerNorm whose output goes through GELU and is convolved.
            first: See :class:`_Conv`.
        """
        affine = (norm.weight, norm.bias, norm.eps) if isinstance(norm, nn.LayerNorm) else (None, None, 0.0)
        out: Tensor = _Conv.apply(autocast(frames), first, *affine, self.kernel, stride)
        return self.biased(out)

    def biased(self, out: Tensor) -> Tensor:
        """With the convolution's bias."""
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def normalised(self, sums: Tensor) -> Tensor:
        """Kernel and bias that give what the group norm makes of the convolution's output, (B, O, kernel + 1).

        Args:
            sums: See :func:`gram`.
        """
        norm, weight = cast("nn.GroupNorm", self.norm), self.conv.weight[:, 0]
        bias = torch.zeros_like(norm.bias) if self.bias is None else self.bias
        taps, scale, shift = (x.to(sums) for x in (torch.cat([weight, bias[:, None]], 1), norm.weight, norm.bias))
        means = taps @ sums / sums[:, -1:, -1:].clamp(min=1)  # of each output's products with the samples, and of it
        mean = means[:, :, -1:]
        scale = scale[:, None] * torch.rsqrt((means * taps).sum(2, keepdim=True) - mean.square() + norm.eps)
        return (taps * scale + F.pad(shift[:, None] - mean * scale, (weight.shape[1], 0))).to(weight)


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
    layers: Sequence[nn.Module], waveforms: Tensor, lengths: Tensor | None = None, sums: Tensor | None = None
) -> Tensor:
    """Run the convolution blocks on waveforms.

    Args:
        layers: Blocks that :func:`can_extract` accepts.
        waveforms: (B, S).
        lengths: Samples that count in the statistics of a group norm, (B,).
        sums: What these statistics follow from, if known already: see :func:`gram`.

    Returns:
        (B, T, C).
    """
    blocks, first = [_Block(layer) for layer in layers], None
    if isinstance(blocks[0].norm, nn.GroupNorm):
        first = blocks[0].normalised(gram(waveforms, blocks[0].shape, lengths) if sums is None else sums)
    parts = [
        _extract(blocks, piece, first if first is None else first[rows]) for rows, piece in _pieces(waveforms, blocks)
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.flatten(0, 1) for part in parts]).unflatten(0, (len(waveforms), -1))


def _pieces(waveforms: Tensor, blocks: Sequence[_Block]) -> Iterator[tuple[slice, Tensor]]:
    """Parts of a batch, one utterance after the other, whose frames together are the frames of the batch."""
    (batch, samples), on_cpu = waveforms.shape, waveforms.device.type == "cpu"
    channels, _, stride = blocks[0].shape
    limit = CPU_BYTES * stride // (channels * blocks[0].kernel.itemsize) if on_cpu else SAMPLES
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and not on_cpu):
        yield slice(batch), waveforms
        return
    if samples <= limit:
        step = limit // samples
        for start in range(0, batch, step):
            yield slice(start, start + step), waveforms[start : start + step]
        return
    shapes = [block.shape for block in blocks]
    hop, field = math.prod(stride for _, _, stride in shapes), receptive_field(shapes)
    frames = conv_length(shapes, samples)
    count = -(-frames // max(1, limit // hop))
    for row in range(batch):
        for i in range(count):
            start, stop = frames * i // count, frames * (i + 1) // count
            yield slice(row, row + 1), waveforms[row : row + 1, start * hop : (stop - 1) * hop + field]


def _extract(blocks: Sequence[_Block], waveforms: Tensor, first: Tensor | None) -> Tensor:
    """:func:`extract` at once; ``first``: see :meth:`_Block.normalised`."""
    (batch, samples), shapes = waveforms.shape, [block.shape for block in blocks]
    frames = _first_rows(waveforms, shapes)
    lean, (block, *others) = is_lean(frames), blocks
    norm: nn.Module | None = block.norm
    if first is not None:
        source = F.pad(frames, (0, 1), value=1.0).view(batch, -1, first.shape[2])
        with without_autocast(source):
            if lean and others:
                block, *others = others
                frames = _FirstConvs.apply(source, first, block.kernel, block.stride)
                frames, norm = block.biased(frames), block.norm
            else:
                frames = (source @ first.mT).flatten(0, 1)
    elif lean and others and block.bias is None and isinstance(norm, nn.LayerNorm):
        products = block.kernel
        block, *others = others
        frames, norm = block.convolve(frames, block.stride, norm, products), block.norm
    else:
        frames = block.convolve(frames, 1)
    for block in others:
        if lean and isinstance(norm, nn.LayerNorm):  # it and GELU belong to the convolution that follows
            frames = block.convolve(frames, block.stride, norm)
        else:
            frames = block.convolve(_activate(frames, norm), block.stride)
        norm = block.norm
    frames = _activate(frames, norm)
    return frames.view(batch, -1, frames.shape[1])[:, : conv_length(shapes, samples)]


def _activate(frames: Tensor, norm: nn.Module | None) -> Tensor:
    """GELU of a block's output, after its LayerNorm if it has one."""
    if isinstance(norm, nn.LayerNorm):
        frames = F.layer_norm(frames, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return F.gelu(frames) if torch.is_grad_enabled() else torch.ops.aten.gelu_(frames)


def valid_rows(lengths: Tensor, shape: tuple[int, int, int], num_rows: int) -> Tensor:
    """Which outputs of the first convolution belong to utterances of so many samples, (B, R)."""
    return torch.arange(num_rows, device=lengths.device) < conv_length([shape], lengths).unsqueeze(1)


def _first_rows(waveforms: Tensor, shapes: ConvShapes) -> Tensor:
    """The samples under each output of the first convolution, (B * R, kernel), R a multiple of the other strides."""
    batch, samples = waveforms.shape
    _, kernel, stride = shapes[0]
    multiple = math.prod([stride for _, _, stride in shapes[1:]])  # a list, for torch.compile
    rows = -(-conv_length(shapes[:1], samples) // multiple) * multiple
    # One channel: a matrix product over a whole kernel beats one over `stride` samples, and the copy is small.
    kernels = F.pad(waveforms, (0, max(0, (rows - 1) * stride + kernel - samples))).unfold(1, kernel, stride)
    return kernels[:, :rows].reshape(batch * rows, kernel)

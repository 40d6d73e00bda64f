"""Waveform to frames: the convolutional feature extractor and the projection to the transformer's width.

Everything is channels-last. A convolution of kernel k and stride s is ⌈k/s⌉ matrix products on strided views of its
input: nothing is unfolded or transposed, and each norm reads contiguous rows. The utterances of a batch lie one after
the other in a single (rows, channels) matrix, each padded to a number of rows that all strides divide. Outputs whose
kernel would reach into the next utterance are computed with the rest and left out at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spidr.models.kernels import is_lean
from spidr.tools.errors import InputError
from spidr.tools.frames import conv_length, receptive_field

ConvShapes = Sequence[tuple[int, int, int]]

_NormWeights = tuple[Tensor, Tensor, float]
"""Weight, bias and epsilon of a LayerNorm."""

PIECE = 320_000
"""Samples that inference convolves at a time: the first layer's output of a whole hour would fill 24 GB."""


def _strided_conv(frames: Tensor, taps: Tensor, stride: int) -> Tensor:
    """Convolve (rows * stride, C) frames with taps (kernel * C, O) to (rows, O).

    The last outputs, whose kernel passes the last frame, lack the taps that find nothing.
    """
    groups = frames.view(-1, stride * frames.shape[1])
    first, *rest = taps.split(groups.shape[1])
    out = groups[:, : first.shape[0]] @ first
    for shift, part in enumerate(rest, start=1):
        out[:-shift].addmm_(groups[shift:, : part.shape[0]], part)
    return out


def _strided_conv_backward(
    grad: Tensor, frames: Tensor, taps: Tensor, stride: int, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients for frames and taps, those of the two that are needed."""
    groups = frames.view(-1, stride * frames.shape[1])
    first, *rest = taps.split(groups.shape[1])
    grad_frames = grad_taps = None
    if needed[0]:
        if first.shape[0] == groups.shape[1]:
            grad_groups = grad @ first.T
        else:  # the kernel is smaller than the stride: the frames in between have no gradient
            grad_groups = F.pad(grad @ first.T, (0, groups.shape[1] - first.shape[0]))
        for shift, part in enumerate(rest, start=1):
            grad_groups[shift:, : part.shape[0]].addmm_(grad[:-shift], part.T)
        grad_frames = grad_groups.view_as(frames)
    if needed[1]:
        products = [groups[:, : first.shape[0]].T @ grad]
        for shift, part in enumerate(rest, start=1):
            products.append(groups[shift:, : part.shape[0]].T @ grad[:-shift])
        grad_taps = torch.cat(products)
    return grad_frames, grad_taps


class _StridedConv(torch.autograd.Function):
    """:func:`_strided_conv`."""

    @staticmethod
    def forward(ctx: Any, frames: Tensor, taps: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(frames, taps)
        ctx.stride = stride
        return _strided_conv(frames, taps, stride)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        frames, taps = ctx.saved_tensors
        return *_strided_conv_backward(grad, frames, taps, ctx.stride, ctx.needs_input_grad), None


def _normed_conv(rows: Tensor, norm: _NormWeights, taps: Tensor, stride: int) -> Tensor:
    """:func:`_strided_conv` of ``gelu(layer_norm(rows))``."""
    weight, bias, eps = norm
    return _strided_conv(F.gelu(F.layer_norm(rows, weight.shape, weight, bias, eps)), taps, stride)


def _normed_conv_backward(
    grad: Tensor, rows: Tensor, norm: _NormWeights, taps: Tensor, stride: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for rows, weight and bias of the norm, and taps. The norm and GELU are computed again."""
    weight, bias, eps = norm
    normed, mean, rstd = torch.native_layer_norm(rows, weight.shape, weight, bias, eps)
    grad_frames, grad_taps = _strided_conv_backward(grad, F.gelu(normed), taps, stride, (True, True))
    torch.ops.aten.gelu_backward.grad_input(grad_frames, normed, grad_input=grad_frames)
    del normed  # it is large
    grad_rows, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_frames, rows, weight.shape, mean, rstd, weight, bias, [True, True, True]
    )
    return grad_rows, grad_weight, grad_bias, cast("Tensor", grad_taps)


class _NormedConv(torch.autograd.Function):
    """:func:`_normed_conv`, which keeps one tensor for the backward pass instead of three.

    These are the largest of the whole model.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, eps: float, taps: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(rows, weight, bias, taps)
        ctx.eps, ctx.stride = eps, stride
        return _normed_conv(rows, (weight, bias, eps), taps, stride)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        rows, weight, bias, taps = ctx.saved_tensors
        found = _normed_conv_backward(grad, rows, (weight, bias, ctx.eps), taps, ctx.stride)
        grad_rows, grad_weight, grad_bias, grad_taps = found
        return grad_rows, grad_weight, grad_bias, None, grad_taps, None


class _FirstConvs(torch.autograd.Function):
    """:func:`_normed_conv` of ``kernels @ first``, the first convolution's output, one utterance at a time.

    That output is cheap to compute and has 6.5 MB for each second of speech, so none of it is kept for the backward
    pass, and there is never more of it than for one utterance.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Tensor,
        first: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        taps: Tensor,
        stride: int,
        batch: int,
    ) -> Tensor:
        ctx.save_for_backward(kernels, first, weight, bias, taps)
        ctx.eps, ctx.stride, ctx.batch = eps, stride, batch
        return torch.cat(
            [_normed_conv(part @ first, (weight, bias, eps), taps, stride) for part in kernels.chunk(batch)]
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        kernels, first, weight, bias, taps = ctx.saved_tensors
        totals: tuple[Tensor, ...] = ()
        grad_kernels = []
        for part, part_grad in zip(kernels.chunk(ctx.batch), grad.chunk(ctx.batch), strict=True):
            found = _normed_conv_backward(part_grad, part @ first, (weight, bias, ctx.eps), taps, ctx.stride)
            grad_rows, *others = found
            if ctx.needs_input_grad[0]:
                grad_kernels.append(grad_rows @ first.T)
            others.append(part.T @ grad_rows)
            totals = tuple(a + b for a, b in zip(totals, others, strict=True)) if totals else tuple(others)
        grad_weight, grad_bias, grad_taps, grad_first = totals
        return (
            torch.cat(grad_kernels) if grad_kernels else None,
            grad_first,
            grad_weight,
            grad_bias,
            None,
            grad_taps,
            None,
            None,
        )


class ConvLayer(nn.Module):
    """One convolution, its norm if any, and GELU, on channels-last rows."""

    def __init__(self, in_channels: int, shape: tuple[int, int, int], norm: nn.Module | None, *, bias: bool) -> None:
        super().__init__()
        out_channels, kernel, stride = shape
        self.layer_norm = norm
        # Holds the weights only, under the published names and in the published shape (O, C, kernel).
        self.conv = nn.Conv1d(in_channels, out_channels, kernel, stride, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight)

    def taps(self, dtype: torch.dtype) -> Tensor:
        """The kernel as the right factor of products, (kernel * C, O)."""
        return self.conv.weight.permute(2, 1, 0).flatten(0, 1).to(dtype)

    def convolve(self, frames: Tensor, stride: int, norm: nn.LayerNorm | None = None) -> Tensor:
        """Convolve the rows of all utterances, (B * R * stride, C) to (B * R, O), after ``norm``, if any, and GELU."""
        frames = _autocast(frames)
        taps = self.taps(frames.dtype)
        if norm is None:
            out = _StridedConv.apply(frames, taps, stride)
        else:
            out = _NormedConv.apply(frames, norm.weight, norm.bias, norm.eps, taps, stride)
        return out if self.conv.bias is None else out + self.conv.bias.to(out.dtype)

    def convolve_after(self, first: ConvLayer, kernels: Tensor, stride: int, batch: int) -> Tensor:
        """Convolve the output of the ``first`` layer, whose LayerNorm and GELU come in between.

        Args:
            first: Without bias.
            kernels: What each of its outputs sees, (B * R * stride, kernel).
            stride: Of this layer.
            batch: The number of utterances B.

        Returns:
            (B * R, O).
        """
        kernels, norm = _autocast(kernels), cast("nn.LayerNorm", first.layer_norm)
        out: Tensor = _FirstConvs.apply(
            kernels,
            first.taps(kernels.dtype),
            norm.weight,
            norm.bias,
            norm.eps,
            self.taps(kernels.dtype),
            stride,
            batch,
        )
        return out if self.conv.bias is None else out + self.conv.bias.to(out.dtype)

    def activate(self, out: Tensor, moments: Moments | None) -> Tensor:
        """Normalise and activate, (B * R, O) to the same; a group norm needs the ``moments`` of each channel."""
        if isinstance(self.layer_norm, nn.GroupNorm):
            if moments is None:
                raise ValueError("a group norm needs the moments of its channels")
            out = moments.normalise(out, self.layer_norm)
        elif self.layer_norm is not None:
            out = self.layer_norm(out)
        return F.gelu(out)


def _autocast(x: Tensor) -> Tensor:
    """In the type that autocast gives to matrix products, as operations of ours are unknown to it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


@dataclass(frozen=True)
class Moments:
    """Number (B, 1, 1), mean and variance (B, 1, C) of each channel's values in each utterance, float32 at least."""

    count: Tensor
    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, frames: Tensor, valid: Tensor) -> Moments:
        """Over the ``valid`` (B, R) of the frames (B, R, C)."""
        frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
        weight = valid.unsqueeze(-1).to(frames.dtype)
        count = weight.sum(1, keepdim=True)
        divisor = count.clamp(min=1)
        mean = (frames * weight).sum(1, keepdim=True) / divisor
        return cls(count, mean, ((frames - mean).square() * weight).sum(1, keepdim=True) / divisor)

    def joined(self, other: Moments) -> Moments:
        """Over the values of both (Chan, Golub, LeVeque 1979)."""
        count = (self.count + other.count).clamp(min=1)
        share, delta = other.count / count, other.mean - self.mean
        var = (1 - share) * self.var + share * other.var + (1 - share) * share * delta.square()
        return Moments(self.count + other.count, self.mean + share * delta, var)

    def normalise(self, rows: Tensor, norm: nn.GroupNorm) -> Tensor:
        """Standardise rows (B * R, C), scale and shift them."""
        frames = rows.view(len(self.mean), -1, rows.shape[1]).to(self.mean.dtype)
        out = (frames - self.mean) * torch.rsqrt(self.var + norm.eps) * norm.weight + norm.bias
        return out.flatten(0, 1).to(rows.dtype)


class FeatureExtractor(nn.Module):
    """A stack of strided convolutions without padding, each followed by a norm (see ``mode``) and exact GELU.

    Args:
        mode: "layer_norm" for a LayerNorm over channels after every convolution, "group_norm" for a GroupNorm with one
            group per channel after the first only.
        shapes: (out_channels, kernel, stride) of each convolution.
        bias: Whether the convolutions have a bias.
    """

    def __init__(self, mode: str, shapes: ConvShapes, *, bias: bool) -> None:
        super().__init__()
        self.shapes = [(channels, kernel, stride) for channels, kernel, stride in shapes]
        self.mode = mode
        channels = [1, *(shape[0] for shape in self.shapes)]
        norms: list[nn.Module | None] = [nn.LayerNorm(channel) for channel in channels[1:]]
        if mode == "group_norm":
            norms = [nn.GroupNorm(channels[1], channels[1]), *[None] * (len(self.shapes) - 1)]
        self.conv_layers = nn.ModuleList(
            ConvLayer(channel, shape, norm, bias=bias)
            for channel, shape, norm in zip(channels, self.shapes, norms, strict=False)
        )
        self.row_multiple = math.prod(stride for _, _, stride in self.shapes[1:])

    def _layers(self) -> list[ConvLayer]:
        return [cast("ConvLayer", layer) for layer in self.conv_layers]

    def num_frames(self, num_samples: int) -> int:
        """Frames that ``num_samples`` samples give."""
        return conv_length(self.shapes, num_samples)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Turn waveforms into frames.

        Args:
            waveforms: (B, S) float.
            lengths: Samples that count in each row, (B,). They matter to a group norm only, which otherwise takes its
                statistics over the padding too.

        Returns:
            (B, T, C) with T the number of frames of S samples.

        Raises:
            InputError: If S samples do not fill one frame.
        """
        samples = waveforms.shape[1]
        if len(waveforms) == 0:
            raise InputError("a batch of waveforms must have at least one row")
        if self.num_frames(samples) < 1:
            raise InputError(f"waveforms of {samples} samples are too short: they do not fill one frame")
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or waveforms.numel() <= PIECE:
            return self._convolve(waveforms, lengths)
        rows = max(1, PIECE // samples)
        parts = [slice(start, start + rows) for start in range(0, len(waveforms), rows)]
        return torch.cat([self._in_pieces(waveforms[i], None if lengths is None else lengths[i]) for i in parts])

    def _in_pieces(self, waveforms: Tensor, lengths: Tensor | None) -> Tensor:
        """The same frames from overlapping pieces (a group norm's up to rounding): a frame sees its receptive field."""
        hop, field = math.prod(stride for _, _, stride in self.shapes), receptive_field(self.shapes)
        num_frames, step = self.num_frames(waveforms.shape[1]), max(1, PIECE // (len(waveforms) * hop))
        if num_frames <= step:
            return self._convolve(waveforms, lengths)
        moments = self._moments(waveforms, lengths) if self.mode == "group_norm" else None
        out: Tensor | None = None
        for start in range(0, num_frames, step):
            stop = min(start + step, num_frames)
            piece = self._convolve(waveforms[:, start * hop : (stop - 1) * hop + field], None, moments)
            if out is None:
                out = piece.new_empty(len(waveforms), num_frames, piece.shape[2])
            out[:, start:stop] = piece
        return cast("Tensor", out)

    def _first_rows(self, waveforms: Tensor) -> Tensor:
        """What each output of the first convolution sees, (B * R, kernel), R a multiple of the other strides."""
        batch, samples = waveforms.shape
        _, kernel, stride = self.shapes[0]
        rows = math.ceil(conv_length(self.shapes[:1], samples) / self.row_multiple) * self.row_multiple
        # One channel: a matrix product over a whole kernel beats one over `stride` samples, and the copy is small.
        kernels = F.pad(waveforms, (0, max(0, (rows - 1) * stride + kernel - samples))).unfold(1, kernel, stride)
        return kernels[:, :rows].reshape(batch * rows, kernel)

    def _convolve(self, waveforms: Tensor, lengths: Tensor | None, moments: Moments | None = None) -> Tensor:
        """All layers, with a group norm's ``moments`` or those of these waveforms."""
        batch, samples = waveforms.shape
        frames = self._first_rows(waveforms)
        if self.mode == "layer_norm" and is_lean(frames):
            frames = self._convolve_lean(frames, batch)
        else:
            strides = [1, *(stride for _, _, stride in self.shapes[1:])]
            for layer, stride in zip(self._layers(), strides, strict=True):
                frames = layer.convolve(frames, stride)
                if self.mode == "group_norm" and moments is None:
                    rows = frames.unflatten(0, (batch, -1))
                    moments = Moments.of(rows, self._valid_rows(waveforms, lengths, rows.shape[1]))
                frames = layer.activate(frames, moments)
        return frames.view(batch, -1, frames.shape[1])[:, : self.num_frames(samples)]

    def _convolve_lean(self, kernels: Tensor, batch: int) -> Tensor:
        """All layers. Each LayerNorm and GELU but the last belongs to the convolution that follows."""
        first, *others = layers = self._layers()
        strides = [stride for _, _, stride in self.shapes[1:]]
        start = 0
        if others and first.conv.bias is None:
            frames, start = others[0].convolve_after(first, kernels, strides[0], batch), 1
        else:
            frames = first.convolve(kernels, 1)
        for i in range(start, len(others)):
            frames = others[i].convolve(frames, strides[i], cast("nn.LayerNorm", layers[i].layer_norm))
        return layers[-1].activate(frames, None)

    def _valid_rows(self, waveforms: Tensor, lengths: Tensor | None, num_rows: int) -> Tensor:
        """Which of the first convolution's outputs count in its statistics, (B, R)."""
        batch, samples = waveforms.shape
        counted = torch.full((batch,), samples, device=waveforms.device) if lengths is None else lengths
        return torch.arange(num_rows, device=waveforms.device) < conv_length(self.shapes[:1], counted).unsqueeze(1)

    def _moments(self, waveforms: Tensor, lengths: Tensor | None) -> Moments:
        """What a group norm takes from the whole of each utterance, piece by piece."""
        batch, samples = waveforms.shape
        _, kernel, stride = self.shapes[0]
        num_rows, step = conv_length(self.shapes[:1], samples), max(1, PIECE // (batch * stride))
        valid = self._valid_rows(waveforms, lengths, num_rows)
        moments: Moments | None = None
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            frames = self._first_rows(waveforms[:, start * stride : (stop - 1) * stride + kernel])
            rows = self._layers()[0].convolve(frames, 1).unflatten(0, (batch, -1))
            found = Moments.of(rows[:, : stop - start], valid[:, start:stop])
            moments = found if moments is None else moments.joined(found)
        return cast("Moments", moments)


class FeatureProjection(nn.Module):
    """LayerNorm over the extractor's channels, then a linear map to the transformer's width."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(in_features)
        self.projection = nn.Linear(in_features, out_features)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, C) to (B, T, D)."""
        return self.projection(self.layer_norm(frames))

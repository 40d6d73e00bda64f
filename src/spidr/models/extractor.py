"""Waveform to frames: the convolutional feature extractor and the projection to the transformer's width.

Everything is channels-last. A convolution of kernel k and stride s is ⌈k/s⌉ matrix products on strided views of its
input: nothing is unfolded or transposed, and each norm reads contiguous rows. The utterances of a batch lie one after
the other in a single (rows, channels) matrix, each padded to a number of rows that all strides divide. Outputs whose
kernel would reach into the next utterance are computed with the rest and left out at the end.

Imports ``spidr.config`` only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spidr.config import InputError, conv_length

ConvShapes = Sequence[tuple[int, int, int]]


class _StridedConv(torch.autograd.Function):
    """Convolve (rows * stride, C) frames with taps (kernel * C, O) to (rows, O).

    The last outputs, whose kernel passes the last frame, lack the taps that find nothing.
    """

    @staticmethod
    def forward(ctx: Any, frames: Tensor, taps: Tensor, stride: int) -> Tensor:
        groups = frames.view(-1, stride * frames.shape[1])
        first, *rest = taps.split(groups.shape[1])
        out = groups[:, : first.shape[0]] @ first
        for shift, part in enumerate(rest, start=1):
            out[:-shift].addmm_(groups[shift:, : part.shape[0]], part)
        ctx.save_for_backward(frames, taps)
        ctx.stride = stride
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        frames, taps = ctx.saved_tensors
        groups = frames.view(-1, ctx.stride * frames.shape[1])
        first, *rest = taps.split(groups.shape[1])
        grad_frames = grad_taps = None
        if ctx.needs_input_grad[0]:
            if first.shape[0] == groups.shape[1]:
                grad_groups = grad @ first.T
            else:  # the kernel is smaller than the stride: the frames in between have no gradient
                grad_groups = F.pad(grad @ first.T, (0, groups.shape[1] - first.shape[0]))
            for shift, part in enumerate(rest, start=1):
                grad_groups[shift:, : part.shape[0]].addmm_(grad[:-shift], part.T)
            grad_frames = grad_groups.view_as(frames)
        if ctx.needs_input_grad[1]:
            products = [groups[:, : first.shape[0]].T @ grad]
            for shift, part in enumerate(rest, start=1):
                products.append(groups[shift:, : part.shape[0]].T @ grad[:-shift])
            grad_taps = torch.cat(products)
        return grad_frames, grad_taps, None


class ConvLayer(nn.Module):
    """One convolution, its norm if any, and GELU, on channels-last rows."""

    def __init__(self, in_channels: int, shape: tuple[int, int, int], norm: nn.Module | None, *, bias: bool) -> None:
        super().__init__()
        out_channels, kernel, stride = shape
        self.layer_norm = norm
        # Holds the weights only, under the published names and in the published shape (O, C, kernel).
        self.conv = nn.Conv1d(in_channels, out_channels, kernel, stride, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight)

    def forward(self, frames: Tensor, stride: int, valid: Tensor | None = None) -> Tensor:
        """Convolve, normalise, activate.

        Args:
            frames: Rows of all utterances, (B * R * stride, C).
            stride: Rows from one output to the next.
            valid: Rows that count in the statistics of a group norm, (B, R) with as many rows in each utterance.

        Returns:
            (B * R, O).
        """
        taps = self.conv.weight.permute(2, 1, 0).flatten(0, 1)
        if torch.is_autocast_enabled(frames.device.type):
            dtype = torch.get_autocast_dtype(frames.device.type)
            frames, taps = frames.to(dtype), taps.to(dtype)
        out = _StridedConv.apply(frames, taps, stride)
        if self.conv.bias is not None:
            out = out + self.conv.bias.to(out.dtype)
        if isinstance(self.layer_norm, nn.GroupNorm):
            if valid is None:
                raise ValueError("a group norm needs to know which rows are valid")
            out = _channel_norm(out.view(*valid.shape, -1), valid, self.layer_norm).flatten(0, 1)
        elif self.layer_norm is not None:
            out = self.layer_norm(out)
        return F.gelu(out)


def _channel_norm(frames: Tensor, valid: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Group norm with one group per channel, (B, R, C), over the ``valid`` frames (B, R), in float32 at least."""
    dtype = frames.dtype
    frames = frames.to(torch.promote_types(dtype, torch.float32))
    weight = valid.unsqueeze(-1).to(frames.dtype)
    count = weight.sum(1, keepdim=True)
    mean = (frames * weight).sum(1, keepdim=True) / count
    centred = frames - mean
    var = (centred.square() * weight).sum(1, keepdim=True) / count
    return (centred * torch.rsqrt(var + norm.eps) * norm.weight + norm.bias).to(dtype)


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
        batch, samples = waveforms.shape
        num_frames = self.num_frames(samples)
        if num_frames < 1:
            raise InputError(f"waveforms of {samples} samples are too short: they do not fill one frame")
        _, kernel, stride = self.shapes[0]
        first_frames = conv_length(self.shapes[:1], samples)
        rows = math.ceil(first_frames / self.row_multiple) * self.row_multiple
        # One channel: a matrix product over a whole kernel beats one over `stride` samples, and the copy is small.
        kernels = F.pad(waveforms, (0, max(0, (rows - 1) * stride + kernel - samples))).unfold(1, kernel, stride)
        frames = kernels[:, :rows].reshape(batch * rows, kernel)
        strides = [1, *(stride for _, _, stride in self.shapes[1:])]
        valid = None
        if self.mode == "group_norm":
            counted = torch.full((batch,), samples, device=waveforms.device) if lengths is None else lengths
            index = torch.arange(rows, device=waveforms.device)
            valid = index < conv_length(self.shapes[:1], counted).unsqueeze(1)
        for layer, stride in zip(self.conv_layers, strides, strict=True):
            frames = layer(frames, stride, valid)
        return frames.view(batch, -1, frames.shape[1])[:, :num_frames]


class FeatureProjection(nn.Module):
    """LayerNorm over the extractor's channels, then a linear map to the transformer's width."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(in_features)
        self.projection = nn.Linear(in_features, out_features)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, C) to (B, T, D)."""
        return self.projection(self.layer_norm(frames))

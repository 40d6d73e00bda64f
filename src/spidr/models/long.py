"""Long recordings without gradients: piece by piece, the same numbers in little memory."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from spidr.models.convolutions import SAMPLES, can_extract, conv_shapes, extract, gram
from spidr.models.kernels import linear, through, untouched
from spidr.tools.frames import conv_length, receptive_field
from spidr.tools.waveforms import Read

LONG = 16_384
"""Frames above which the transformer goes piece by piece, so that a few (T, D) tensors are all there is at a time."""

PIECE = LONG // 8
"""Frames of such a piece: the feed-forward's hidden layer takes 25 MB in the base models."""


def _in_inference() -> bool:
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


# ------------------------------------------------------------------------------------------------- the extractor


def extract_in_parts(layers: Sequence[nn.Module], waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
    """:func:`extract`, but a large batch for a group norm goes a few rows at a time, and a long row piece by piece."""
    if not (_has_group_norm(layers) and _in_inference() and waveforms.numel() > SAMPLES):
        return extract(layers, waveforms, lengths)
    samples = waveforms.shape[1]
    parts, rows = [], max(1, SAMPLES // samples)
    for start in range(0, len(waveforms), rows):
        part = waveforms[start : start + rows]
        counted = None if lengths is None else lengths[start : start + rows]
        if samples <= SAMPLES:
            parts.append(extract(layers, part, counted))
        else:
            pieces = Pieces(layers, partial(_samples, part), samples, counted)
            parts.append(pieces(0, conv_length(pieces.shapes, samples)))
    return torch.cat(parts)


def _has_group_norm(layers: Sequence[nn.Module]) -> bool:
    return isinstance(layers[0].layer_norm, nn.GroupNorm)


def _samples(waveforms: Tensor, start: int, stop: int) -> Tensor:
    return waveforms[:, start:stop]


def frame_reader(extractor: nn.Module, read: Read, samples: int) -> Callable[[int, int], Tensor]:
    """A function that gives the frames (B, stop - start, C) of long waveforms from ``start`` to ``stop``."""
    if untouched(extractor) and can_extract(layers := list(cast("nn.ModuleList", extractor.conv_layers))):
        return Pieces(layers, read, samples)
    whole = extractor(read(0, samples))
    return lambda start, stop: whole[:, start:stop]


class Pieces:
    """Any frames of a batch of long waveforms: a frame sees its receptive field only.

    Args:
        layers: Convolution blocks that :func:`can_extract` accepts.
        read: Reads the waveforms.
        samples: How many samples each has.
        lengths: Samples that count in the statistics of a group norm, (B,), taken over the whole beforehand.
    """

    def __init__(self, layers: Sequence[nn.Module], read: Read, samples: int, lengths: Tensor | None = None) -> None:
        self.layers, self.read = layers, read
        self.shapes = conv_shapes(cast("nn.Conv1d", layer.conv) for layer in layers)
        self.hop, self.field = math.prod(stride for _, _, stride in self.shapes), receptive_field(self.shapes)
        self.sums = self._sums(samples, lengths) if _has_group_norm(layers) else None

    def __call__(self, start: int, stop: int) -> Tensor:
        """Frames from ``start`` to ``stop``, (B, stop - start, C)."""
        step = max(1, SAMPLES // self.hop)
        out: Tensor | None = None
        for first in range(start, stop, step):
            last = min(first + step, stop)
            piece = self.read(first * self.hop, (last - 1) * self.hop + self.field)
            found = extract(self.layers, piece, sums=self.sums)
            out = found.new_empty(len(found), stop - start, found.shape[2]) if out is None else out
            out[:, first - start : last - start] = found
        return cast("Tensor", out)

    def _sums(self, samples: int, lengths: Tensor | None) -> Tensor:
        """What the group norm's statistics over the whole of each utterance follow from."""
        _, kernel, stride = self.shapes[0]
        num_rows, step = conv_length(self.shapes[:1], samples), max(1, SAMPLES // stride)
        sums: Any = 0
        for start in range(0, num_rows, step):
            piece = self.read(start * stride, (min(start + step, num_rows) - 1) * stride + kernel)
            left = None if lengths is None else (lengths - start * stride).clamp(0, piece.shape[1])
            sums = sums + gram(piece, self.shapes[0], left)
        return cast("Tensor", sums)


# ----------------------------------------------------------------------------------------------- the transformer


def is_long(transformer: nn.Module, x: Tensor) -> bool:
    """Whether projected features (B, T, D) go through a transformer piece by piece."""
    return _in_inference() and x.shape[1] > LONG and not transformer.training and untouched(transformer)


def first_input(transformer: Any, x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The first block's input. Positional convolutions see what is on either side of a piece."""
    convs = transformer.pos_conv_embed
    around = convs.depth * (convs.layer_kernel_size // 2)
    positions = torch.empty_like(x)
    for start in range(0, x.shape[1], LONG):
        left, stop = max(0, start - around), min(start + LONG, x.shape[1])
        seen = slice(left, stop + around)
        found = convs(x[:, seen], None if attention_mask is None else attention_mask[..., :1, seen])
        positions[:, start:stop] = found[:, start - left : stop - left]
    return _piecewise(lambda x, y: (transformer.start(x, y),), x, positions)[0]


def run_block(layer: Any, x: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """A block's output and its feed-forward output."""
    attended = _attention(layer.attention, layer.layer_norm(x) if layer.layer_norm_first else x, attention_mask)
    return _piecewise(lambda x, y: layer.after_attention(x + y), x, attended)


def _attention(module: Any, x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Head by head: queries, keys and values of all at once would be the largest tensor of all."""
    weight = module.qkv.weight.unflatten(0, (3, module.num_heads, -1))
    bias = None if module.qkv.bias is None else module.qkv.bias.unflatten(0, (3, module.num_heads, -1))
    heads: Tensor | None = None
    for head in range(module.num_heads):
        head_bias = None if bias is None else bias[:, head].flatten()
        found = module.attend_heads(linear(x, weight[:, head].flatten(0, 1), head_bias), 1, attention_mask)
        heads = found.new_empty(*found.shape[:2], module.num_heads, found.shape[2]) if heads is None else heads
        heads[:, :, head] = found
    return _piecewise(lambda y: (through(module.proj, y),), cast("Tensor", heads).flatten(2))[0]


def _piecewise(function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> list[Tensor]:
    """Apply a function to (B, T, ...) tensors, ``PIECE`` frames at a time.

    Its first result takes the place of the last input, which nobody must need any more, if the types are the same.
    """
    num_frames = inputs[0].shape[1]
    outputs: list[Tensor] = []
    for start in range(0, num_frames, PIECE):
        part = slice(start, start + PIECE)
        found = function(*(x[:, part] for x in inputs))
        if not outputs:
            first = [inputs[-1]] if inputs[-1].dtype == found[0].dtype else []
            outputs = first + [x.new_empty(x.shape[0], num_frames, *x.shape[2:]) for x in found[len(first) :]]
        for output, piece in zip(outputs, found, strict=True):
            output[:, part] = piece
    return outputs

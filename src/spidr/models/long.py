"""Long recordings without gradients: piece by piece, the same numbers in little memory."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from spidr.models.extractor import FeatureExtractor
from spidr.models.kernels import (
    SAMPLES,
    can_extract,
    extract,
    gram,
    linear,
    through,
    untouched,
)
from spidr.models.transformer import SelfAttention, Transformer, TransformerLayer
from spidr.tools.errors import InputError
from spidr.tools.frames import conv_length, receptive_field
from spidr.tools.waveforms import Read

LONG = 16_384
"""Frames above which the transformer goes piece by piece, so that a few (T, D) tensors are all there is at a time."""

PIECE = LONG // 8
"""Frames of such a piece: the feed-forward's hidden layer takes 25 MB in the base models."""


def extract_features(extractor: FeatureExtractor, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Call a feature extractor, (B, S) to (B, T, C); one with a group norm in pieces if the batch is large."""
    if not isinstance(extractor, FeatureExtractor) or not extractor.has_group_norm:
        return extractor(waveforms)  # frames do not depend on padding, and a published extractor has one argument
    samples = waveforms.shape[1]
    if (
        waveforms.numel() <= SAMPLES
        or not _serves(extractor)
        or extractor.num_frames(samples) < 1
        or not can_extract(list(extractor.conv_layers))
    ):
        return extractor(waveforms) if lengths is None else extractor(waveforms, lengths)
    parts, rows = [], max(1, SAMPLES // samples)
    for start in range(0, len(waveforms), rows):
        part = waveforms[start : start + rows]
        counted = None if lengths is None else lengths[start : start + rows]
        if samples <= SAMPLES:
            parts.append(extractor(part, counted))
        else:
            pieces = Pieces(extractor, partial(_samples, part), samples, counted)
            parts.append(pieces(0, pieces.num_frames))
    return torch.cat(parts)


def _samples(waveforms: Tensor, start: int, stop: int) -> Tensor:
    return waveforms[:, start:stop]


def frame_reader(extractor: FeatureExtractor, read: Read, samples: int) -> Callable[[int, int], Tensor]:
    """A function that gives the frames (B, stop - start, C) of long waveforms from ``start`` to ``stop``."""
    if untouched(extractor) and can_extract(list(extractor.conv_layers)):
        return Pieces(extractor, read, samples)
    whole = extractor(read(0, samples))
    return lambda start, stop: whole[:, start:stop]


class Pieces:
    """Any frames of a batch of long waveforms: a frame sees its receptive field only.

    Args:
        extractor: The feature extractor.
        read: Reads the waveforms.
        samples: How many samples each has.
        lengths: Samples that count in the statistics of a group norm, (B,), gathered at once over all pieces.
    """

    def __init__(self, extractor: FeatureExtractor, read: Read, samples: int, lengths: Tensor | None = None) -> None:
        self.layers, self.shapes, self.read = list(extractor.conv_layers), extractor.shapes, read
        self.hop, self.field = math.prod(stride for _, _, stride in self.shapes), receptive_field(self.shapes)
        self.num_frames = extractor.num_frames(samples)
        self.sums = self._sums(samples, lengths) if extractor.has_group_norm else None

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


def layer_outputs(
    student: Transformer, x: Tensor, attention_mask: Tensor | None, num_layers: int | None = None, **options: Any
) -> list[Tensor]:
    """:meth:`Transformer.get_intermediate_outputs`, piece by piece above ``LONG`` frames."""
    if not _is_long(student, x):
        return student.get_intermediate_outputs(x, attention_mask, num_layers, **options)
    return _run(student, x, attention_mask, num_layers, **options)[1]


def final_output(student: Transformer, x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Call a transformer, piece by piece above ``LONG`` frames."""
    if not _is_long(student, x):
        return student(x, attention_mask)
    return student.finish(_run(student, x, attention_mask, skip=len(student.layers))[0])


def window_frames(window: float, context: float | None, frame_seconds: float) -> tuple[int, int]:
    """Frames in a window, and frames seen on each side of it.

    Args:
        window: Seconds.
        context: Seconds; None: a quarter of the window.
        frame_seconds: Seconds from one frame to the next.

    Raises:
        InputError: The window is shorter than a frame, the context negative, or one of them not finite.
    """
    for name, seconds in (("window", window), ("context", context)):
        if seconds is not None and not math.isfinite(seconds):
            raise InputError(f"{name} = {seconds} s is not a number of seconds")
    size, around = round(window / frame_seconds), round((window / 4 if context is None else context) / frame_seconds)
    if size < 1:
        raise InputError(f"window = {window} s is shorter than a frame of {frame_seconds} s")
    if around < 0:
        raise InputError(f"context = {context} s needs to be at least 0 and goes with a window")
    return size, around


def windows(
    project: Callable[[int, int], Tensor],
    function: Callable[[Tensor], Tensor],
    num_frames: int,
    *,
    size: int,
    context: int,
) -> Iterator[Tensor]:
    """Apply a function to windows of a recording, each with its surroundings.

    Args:
        project: Gives projected features (B, stop - start, D) from ``start`` to ``stop``; none is asked for twice.
        function: (B, T, D) to (B, T, ...).
        num_frames: Frames of the recording.
        size: Frames of a window.
        context: Frames that are seen on each side of it.

    Yields:
        (B, t, ...) of one window after the other.
    """
    seen: Tensor | None = None
    begin = end = 0
    for start in range(0, num_frames, size):
        stop, left = min(start + size, num_frames), max(0, start - context)
        right = min(stop + context, num_frames)
        parts = [] if seen is None else [seen[:, left - begin :]]
        if right > end:
            parts.append(project(end, right))
        seen = torch.cat(parts, dim=1)
        begin, end = left, right
        yield function(seen)[:, start - left : stop - left]


def _serves(module: nn.Module) -> bool:
    """Whether a module may go piece by piece: in eager inference, with no hook that waits for the whole."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and untouched(module)


def _is_long(student: Transformer, x: Tensor) -> bool:
    return x.shape[1] > LONG and not student.training and _serves(student)


def _run(
    student: Transformer,
    x: Tensor,
    attention_mask: Tensor | None,
    num_layers: int | None = None,
    *,
    before_residual: bool = True,
    skip: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """:meth:`Transformer.run`: the residual stream after the first blocks, and their outputs."""
    positions = _positions(student, x, attention_mask)
    x = _piecewise(student.start, x, positions, into=positions)
    found = []
    for i, layer in enumerate(student.layers[:num_layers]):
        x, forwarded = _block(cast("TransformerLayer", layer), x, attention_mask)
        if i >= skip:
            found.append(forwarded if before_residual else x)
    return x, found


def _piecewise(function: Callable[..., Tensor], *inputs: Tensor, into: Tensor | None = None) -> Tensor:
    """Apply a function to (B, T, ...) tensors, ``PIECE`` frames at a time.

    The result takes the place of ``into``, a tensor that nobody needs any more, if it is of the same type.
    """
    num_frames = inputs[0].shape[1]
    out: Tensor | None = None
    for start in range(0, num_frames, PIECE):
        part = slice(start, start + PIECE)
        found = function(*(x[:, part] for x in inputs))
        if out is None:
            fits = into is not None and into.dtype == found.dtype
            out = into if fits else found.new_empty(found.shape[0], num_frames, *found.shape[2:])
        cast("Tensor", out)[:, part] = found
    return cast("Tensor", out)


def _positions(student: Transformer, x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The positional convolutions, each piece with what its frames see on either side."""
    convs = student.pos_conv_embed
    around = convs.depth * (convs.layer_kernel_size // 2)
    out = torch.empty_like(x)
    for start in range(0, x.shape[1], LONG):
        left, stop = max(0, start - around), min(start + LONG, x.shape[1])
        seen = slice(left, stop + around)
        found = convs(x[:, seen], None if attention_mask is None else attention_mask[..., :1, seen])
        out[:, start:stop] = found[:, start - left : stop - left]
    return out


def _attention(module: SelfAttention, x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Head by head: queries, keys and values of all at once would be the largest tensor of all."""
    weight = module.qkv.weight.unflatten(0, (3, module.num_heads, -1))
    bias = None if module.qkv.bias is None else module.qkv.bias.unflatten(0, (3, module.num_heads, -1))
    size = weight.shape[2]
    heads: Tensor | None = None
    for head in range(module.num_heads):
        head_bias = None if bias is None else bias[:, head].flatten()
        found = module.attend_heads(linear(x, weight[:, head].flatten(0, 1), head_bias), 1, attention_mask)
        heads = found.new_empty(*found.shape[:2], module.num_heads * size) if heads is None else heads
        heads[..., head * size : (head + 1) * size] = found
    return _piecewise(partial(through, module.proj), cast("Tensor", heads), into=heads)


def _block(layer: TransformerLayer, x: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """A block's output and its feed-forward output; the former takes the place of the residual stream."""

    def add(norm: nn.Module | None) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, y: x + y if norm is None else norm(x + y)

    first = layer.layer_norm_first
    attended = _attention(layer.attention, layer.layer_norm(x) if first else x, attention_mask)
    x = _piecewise(add(None if first else layer.layer_norm), x, attended, into=attended)
    forwarded = _piecewise(layer.feed_forward, layer.final_layer_norm(x) if first else x)
    return _piecewise(add(None if first else layer.final_layer_norm), x, forwarded, into=x), forwarded

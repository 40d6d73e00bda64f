"""Waveforms to features and units: extractor, projection, student and heads."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from spidr.config import SAMPLE_RATE, DinoSRConfig
from spidr.models.extractor import FeatureExtractor, FeatureProjection
from spidr.models.kernels import exact_products, known, linear, suits_onednn, untouched
from spidr.models.long import frame_reader
from spidr.models.transformer import Transformer
from spidr.tools.errors import InputError
from spidr.tools.frames import conv_length
from spidr.tools.untrusted import check_memory
from spidr.tools.waveforms import Read, moments, standardise, warn_if_quiet

Waveforms = Tensor | NDArray[Any]
Lengths = Tensor | NDArray[Any] | Sequence[int]


@known
class Head(nn.Sequential):
    """Linear, then log-softmax: log-probabilities of the codewords."""


class Encoder(nn.Module):
    """Encode speech: the parts of a model that inference needs.

    Waveforms are sampled at 16 kHz. :meth:`encode` and :meth:`units` standardise each utterance (mean 0, variance 1);
    the other methods take them as they are.

    Args:
        cfg: Settings of the model; None: the base model.
    """

    config_class: ClassVar[type[DinoSRConfig]] = DinoSRConfig
    best_layer: int = 5
    """The layer, counted from 1, whose units are the most phonetic in the base model."""
    heads_read_layers: ClassVar[bool] = False
    """Whether head k reads the layer of codebook k, before the residual addition, instead of the final output."""

    def __init__(self, cfg: DinoSRConfig | None = None) -> None:
        super().__init__()
        cfg = self.config_class() if cfg is None else cfg
        if not isinstance(cfg, self.config_class):
            raise TypeError(f"{type(self).__name__} needs a {self.config_class.__name__}, not a {type(cfg).__name__}")
        self.cfg = cfg
        _check_size(cfg)
        dim, shapes = cfg.encoder_embed_dim, cfg.extractor_conv_layer_config
        self.mask_embedding = nn.Parameter(torch.empty(dim).uniform_())  # for training, but drawn first
        self.feature_extractor = FeatureExtractor.build(cfg.extractor_mode, shapes, bias=cfg.extractor_conv_bias)
        self.feature_projection = FeatureProjection(shapes[-1][0], dim)
        self.student = Transformer.build(cfg)
        self.heads = nn.ModuleList(
            Head(nn.Linear(dim, cfg.codebook_size), nn.LogSoftmax(dim=-1)) for _ in range(cfg.num_codebooks)
        )
        self.extractor_frozen = False

    def __repr__(self) -> str:
        cfg, millions = self.cfg, sum(p.numel() for p in self.parameters()) / 1e6
        layers = f"{cfg.encoder_num_layers} layers of {cfg.encoder_embed_dim}"
        codebooks = f"{cfg.num_codebooks} codebooks of {cfg.codebook_size}"
        modules = ", ".join(name for name, _ in self.named_children())
        return f"{type(self).__name__}({layers}, {codebooks}, {millions:.1f} M parameters; modules: {modules})"

    @property
    def conv_shapes(self) -> Sequence[tuple[int, int, int]]:
        """(out_channels, kernel, stride) of the extractor's convolutions, as they are now."""
        return getattr(self.feature_extractor, "shapes", None) or self.cfg.extractor_conv_layer_config

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks K; codebook ``k`` belongs to layer ``num_layers - K + k`` (from 0)."""
        return len(self.heads)

    @property
    def codebook_layers(self) -> range:
        """The layers that have a codebook, counted from 1: the last K."""
        last = len(self.student.layers)
        return range(last - self.num_codebooks + 1, last + 1)

    # ------------------------------------------------------------------------------------------------- parts

    def project(
        self,
        waveforms: Tensor,
        attention_mask: Tensor | None = None,
        lengths: Lengths | None = None,
        frames: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute projected features of a batch, and the attention mask to use with them.

        Args:
            waveforms: (B, S) float.
            attention_mask: Boolean, True where to attend, broadcastable to (B, 1, T, T).
            lengths: Samples that count in each row, (B,), instead of the mask. In group-norm mode they also keep
                padding out of the first layer's statistics; beside a mask they are not checked, as that would wait for
                the device.
            frames: The extractor's output, (B, T, C), if it is known already.

        Returns:
            (B, T, D) and the mask, or None if every frame exists.

        Raises:
            InputError: If a shape is wrong, the samples are not floats, or a length gives no frame or exceeds S.
        """
        counted = _check_waveforms(waveforms, lengths, self.mask_embedding.dtype)
        shapes, samples = self.conv_shapes, waveforms.shape[1]
        if counted is not None:
            if attention_mask is None:
                _check_lengths(counted, samples, shapes)
            counted = counted.to(waveforms.device)
            if attention_mask is None:
                places = torch.arange(conv_length(shapes, samples), device=waveforms.device)
                attention_mask = (places < conv_length(shapes, counted).unsqueeze(1))[:, None, None]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.extractor_frozen):
            if frames is None:
                frames = self.extract(waveforms, counted)
            return self.feature_projection(frames), attention_mask

    def extract(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Extract frames (B, T, C) from waveforms (B, S). In group-norm mode, padding beyond lengths has no effect."""
        extractor = self.feature_extractor
        # Other frames do not depend on padding, and an extractor in place of ours has one argument.
        if lengths is not None and isinstance(extractor, FeatureExtractor) and extractor.has_group_norm:
            return extractor(waveforms, lengths)
        return extractor(waveforms)

    def _hidden(self, x: Tensor, attention_mask: Tensor | None, num_heads: int, skip: int = 0) -> list[Tensor]:
        """The input of the heads from ``skip`` to ``num_heads``: one (B, T, D) for all of them, or one for each."""
        if self.heads_read_layers:
            first = self.codebook_layers.start - 1
            return self.student.get_intermediate_outputs(x, attention_mask, first + num_heads, skip=first + skip)
        return [self.student(x, attention_mask)]

    def _log_probs(self, hidden: list[Tensor], num_heads: int) -> Tensor | list[Tensor]:
        """Log-probabilities of the first K heads, float32, from what ``_hidden`` gives: (K, ..., V) or K (..., V)."""
        heads = list(self.heads)[:num_heads]
        if _are_plain(heads):
            return F.log_softmax(_logits(heads, hidden).float(), dim=-1)
        each = hidden * num_heads if len(hidden) == 1 else hidden
        return [head(h).float() for head, h in zip(heads, each, strict=True)]

    def get_intermediate_outputs(
        self,
        waveforms: Tensor,
        *,
        attention_mask: Tensor | None = None,
        lengths: Lengths | None = None,
        num_layers: int | None = None,
        before_residual: bool = True,
    ) -> list[Tensor]:
        """Compute the outputs of the student's layers, in training mode with dropout.

        Args:
            waveforms: (B, S) float, 16 kHz, taken as they are.
            attention_mask: Boolean, True where to attend, broadcastable to (B, 1, T, T).
            lengths: See :meth:`project`.
            num_layers: Run the first layers only.
            before_residual: Give each block's feed-forward output before the residual addition, which SpidR's heads
                read, instead of the block's full output.

        Returns:
            One (B, T, D) tensor a layer.
        """
        with exact_products(waveforms.device, self.cfg.encoder_embed_dim):
            x, attention_mask = self.project(waveforms, attention_mask, lengths)
            return self.student.get_intermediate_outputs(x, attention_mask, num_layers, before_residual=before_residual)

    def get_codebooks(
        self,
        waveform: Tensor,
        *,
        attention_mask: Tensor | None = None,
        lengths: Lengths | None = None,
        num_layers: int | None = None,
        onehot: bool = False,
    ) -> list[Tensor | None]:
        """Compute codeword probabilities of each layer, whose argmax is its unit. In training mode with dropout.

        Args:
            waveform: (B, S) float, 16 kHz, taken as it is.
            attention_mask: Boolean, True where to attend, broadcastable to (B, 1, T, T).
            lengths: See :meth:`project`.
            num_layers: Give the first layers only.
            onehot: Give one-hot vectors of the most likely codeword, int64, instead of probabilities, float32.

        Returns:
            One entry a layer: (B, T, V), or None if the layer has no codebook.
        """
        total = len(self.student.layers)
        num_layers = total if num_layers is None else num_layers
        if not 1 <= num_layers <= total:
            raise ValueError(f"num_layers must be between 1 and {total}, not {num_layers}")
        num_heads = num_layers - (total - self.num_codebooks)
        if num_heads < 1:
            return [None] * num_layers
        with exact_products(waveform.device, self.cfg.encoder_embed_dim):
            x, attention_mask = self.project(waveform, attention_mask, lengths)
            log_probs = self._log_probs(self._hidden(x, attention_mask, num_heads), num_heads)
        per_head = [F.one_hot(p.argmax(-1), p.shape[-1]) if onehot else p.exp() for p in log_probs]
        return [*[None] * (num_layers - num_heads), *per_head]

    # ------------------------------------------------------------------------------------------------- inference

    def encode(
        self,
        waveforms: Waveforms,
        lengths: Lengths | None = None,
        *,
        layer: int | None = None,
        normalize: bool = True,
        window: float | None = None,
        context: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute features of a batch of utterances, one every 20 ms with the default convolutions.

        There is no dropout and no gradient, whatever mode the model is in. An utterance of any length is encoded whole:
        memory grows with T, but time with T². With ``window``, the transformer sees one window and its context at a
        time, so it takes less of both, and features differ a little.

        Args:
            waveforms: (B, S) float tensor or array, 16 kHz, shorter rows padded at the end.
            lengths: Samples of each row, (B,); None: all of them.
            layer: Counted from 1; None: :attr:`best_layer`.
            normalize: Standardise each utterance over its own samples, as in training.
            window: Seconds of features to compute at a time; utterances that fit in one are encoded whole.
            context: Seconds to see on each side of a window; None: a quarter of it.

        Returns:
            The layer's output before the residual addition, (B, T, D), and the frames of each row, (B,). Frame ``t`` is
            about the 25 ms from ``t * 20`` ms on. With ``window``, features in the padding are 0.

        Raises:
            InputError: If there is no such layer, a waveform is not finite or gives no frame, a length exceeds S, or
                the window or context is out of range.
        """
        function = partial(self.layer_output, layer=self._layer(layer))
        return self._encode(function, waveforms, lengths, window, context, normalize=normalize)

    def units(
        self,
        waveforms: Waveforms,
        lengths: Lengths | None = None,
        *,
        layer: int | None = None,
        normalize: bool = True,
        window: float | None = None,
        context: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute discrete units of a batch of utterances: the most likely codewords of a layer with a codebook.

        The arguments are those of :meth:`encode`.

        Returns:
            (B, T) int64, -1 in the padding, and the frames of each row, (B,).

        Raises:
            InputError: If the layer has no codebook, or as :meth:`encode`.
        """
        layer, first = self._layer(layer), self.codebook_layers.start
        if layer < first:
            raise InputError(f"layer {layer} has no codebook; layers {first} to {len(self.student.layers)} have one")

        def units(features: Tensor, attention_mask: Tensor | None) -> Tensor:
            return self.unit_logits(features, attention_mask, layer).argmax(-1)

        found, frames = self._encode(units, waveforms, lengths, window, context, normalize=normalize)
        padding = torch.arange(found.shape[1], device=found.device) >= frames.unsqueeze(1)
        return found.masked_fill(padding, -1), frames

    def layer_output(self, features: Tensor, attention_mask: Tensor | None, layer: int) -> Tensor:
        """A layer's output before the residual addition, (B, T, D), from projected features (see :meth:`project`)."""
        return self.student.get_intermediate_outputs(features, attention_mask, layer, skip=layer - 1)[0]

    def unit_logits(self, features: Tensor, attention_mask: Tensor | None, layer: int) -> Tensor:
        """Scores of a layer's units, (B, T, V), from projected features: what its head gives before its softmax."""
        index = layer - self.codebook_layers.start
        head, (hidden,) = self.heads[index], self._hidden(features, attention_mask, index + 1, index)
        return cast("Head", head)[0](hidden) if _are_plain([head]) else head(hidden)

    @property
    def frame_seconds(self) -> float:
        """Seconds from one frame to the next."""
        return math.prod(stride for _, _, stride in self.conv_shapes) / SAMPLE_RATE

    def window_frames(self, window: float | None, context: float | None) -> tuple[int, int] | None:
        """Frames in a window and frames seen on each side of it, from seconds; None without a window.

        Raises:
            InputError: The window is shorter than a frame, the context negative or without a window, or one not finite.
        """
        for name, seconds in (("window", window), ("context", context)):
            if seconds is not None and not math.isfinite(seconds):
                raise InputError(f"{name} = {seconds} s is not a number of seconds")
        if context is not None and (window is None or context < 0):
            raise InputError(f"context = {context} s needs to be at least 0 and goes with a window")
        if window is None:
            return None
        size, around = (round(x / self.frame_seconds) for x in (window, window / 4 if context is None else context))
        if size < 1:
            raise InputError(f"window = {window} s is shorter than a frame of {self.frame_seconds} s")
        return size, around

    def windows(
        self, read: Read, num_samples: int, function: Callable[[Tensor, None], Tensor], *, size: int, context: int
    ) -> Iterator[Tensor]:
        """Apply a function to projected features, a window at a time. Iterate under :meth:`inference`.

        Args:
            read: The waveform, standardised.
            num_samples: Its length.
            function: Projected features (1, T, D) and no attention mask to (1, T, …).
            size: Frames in a window.
            context: Frames seen on each side of it.

        Yields:
            The function's values for each window in turn, (1, at most ``size``, …).
        """
        extract = frame_reader(self.feature_extractor, read, num_samples)
        num_frames = conv_length(self.conv_shapes, num_samples)
        seen: Tensor | None = None
        begin = end = 0
        for start in range(0, num_frames, size):
            stop, left = min(start + size, num_frames), max(0, start - context)
            right = min(stop + context, num_frames)
            parts = [] if seen is None else [seen[:, left - begin :]]
            if right > end:
                parts.append(self.feature_projection(extract(end, right)))
            seen, begin, end = torch.cat(parts, dim=1), left, right
            yield function(seen, None)[:, start - left : stop - left]

    @contextmanager
    def inference(self) -> Iterator[None]:
        """No gradient, no dropout, no TF32. Every module's mode is restored at the end."""
        modules: list[nn.Module] = [self]
        for module in modules:  # `modules()` takes five times as long, a tenth of a small model's call
            modules += filter(None, module._modules.values())
        training = [module for module in modules if module.training]
        for module in training:
            module.training = False
        try:
            with torch.no_grad(), exact_products(self.mask_embedding.device, self.cfg.encoder_embed_dim):
                yield
        finally:
            for module in training:
                module.training = True

    def _layer(self, layer: int | None) -> int:
        chosen, total = self.best_layer if layer is None else layer, len(self.student.layers)
        if not 1 <= chosen <= total:
            default = ", the best of the base model" if layer is None else ""
            raise InputError(f"there is no layer {chosen}{default}: choose a layer from 1 to {total}")
        return chosen

    def _encode(
        self,
        function: Callable[[Tensor, Tensor | None], Tensor],
        waveforms: Waveforms,
        lengths: Lengths | None,
        window: float | None,
        context: float | None,
        *,
        normalize: bool,
    ) -> tuple[Tensor, Tensor]:
        """Value of a function of (projected features, attention mask), and the frames of each row."""
        sizes = self.window_frames(window, context)
        x, shapes = self._as_tensor(waveforms), self.conv_shapes
        counted = _check_waveforms(x, lengths, self.mask_embedding.dtype)
        batch, samples = x.shape
        if counted is not None:
            _check_lengths(counted, samples, shapes)
            counted = counted.to(x.device)
        frames = conv_length(shapes, torch.full((batch,), samples, device=x.device) if counted is None else counted)
        with self.inference():
            statistics = moments(x, counted)
            _check_variances(statistics[1].flatten().tolist(), normalize=normalize)
            if sizes is None or conv_length(shapes, samples) <= sizes[0]:
                if normalize:
                    x = standardise(x, counted, statistics=statistics)
                elif counted is not None:
                    x = x.masked_fill(torch.arange(samples, device=x.device) >= counted.unsqueeze(1), 0)
                return function(*self.project(x, lengths=counted)), frames
            size, around = sizes

            def in_windows(row: int) -> Tensor:
                mean, var = (moment[row : row + 1] for moment in statistics)

                def read(start: int, stop: int) -> Tensor:
                    part = x[row : row + 1, start:stop]
                    return standardise(part, statistics=(mean, var)) if normalize else part

                length = samples if counted is None else int(counted[row])
                return torch.cat([*self.windows(read, length, function, size=size, context=around)], dim=1)[0]

            rows = [in_windows(row) for row in range(batch)]
            out = rows[0].new_zeros(batch, conv_length(shapes, samples), *rows[0].shape[1:])
            for row, values in enumerate(rows):
                out[row, : len(values)] = values
        return out, frames

    def _as_tensor(self, waveforms: Waveforms) -> Tensor:
        """An array in the model's type and on its device; a tensor as it is."""
        if isinstance(waveforms, Tensor):
            return waveforms
        array = np.asarray(waveforms)
        if array.dtype.kind != "f":
            raise InputError(f"waveforms must be floats, about -1 to 1, not {array.dtype}")
        weight = self.mask_embedding
        return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(weight.device, weight.dtype)


def _are_plain(heads: Sequence[nn.Module]) -> bool:
    """Whether heads are what they were built as, so that one product does for all."""
    if not untouched(*heads):
        return False
    shapes = set()
    for head in heads:
        if not isinstance(head, Head) or [type(module) for module in head] != [nn.Linear, nn.LogSoftmax]:
            return False
        first, log_softmax = head
        if first.bias is None or log_softmax.dim != -1:
            return False
        shapes.add(first.weight.shape)
    return len(shapes) == 1


def _logits(heads: Sequence[nn.Module], hidden: list[Tensor]) -> Tensor:
    """K heads, in one product unless oneDNN is faster: K tensors (..., D), or one for all, to (K, ..., V)."""
    linears = cast("list[nn.Linear]", [cast("Head", head)[0] for head in heads])
    if len(hidden) > 1 and suits_onednn(hidden[0], linears[0].weight):
        return torch.stack([linear(x, h.weight, h.bias) for x, h in zip(hidden, linears, strict=True)])
    weight, bias = torch.stack([h.weight for h in linears]), torch.stack([h.bias for h in linears])
    if len(hidden) == 1:
        return linear(hidden[0], weight.flatten(0, 1), bias.flatten()).unflatten(-1, bias.shape).movedim(-2, 0)
    logits = torch.baddbmm(bias.unsqueeze(1), torch.stack(hidden).flatten(1, -2), weight.transpose(1, 2))
    return logits.unflatten(1, hidden[0].shape[:-1])


def _check_waveforms(waveforms: Tensor, lengths: Lengths | None, dtype: torch.dtype) -> Tensor | None:
    """Refuse anything but a batch of waveforms of the model's type and their lengths, which become a tensor."""
    if waveforms.ndim != 2:
        raise InputError(f"waveforms must be (batch, samples), not of shape {tuple(waveforms.shape)}")
    if not waveforms.is_floating_point():
        raise InputError(f"waveforms must be floats, about -1 to 1, not {waveforms.dtype}")
    if waveforms.dtype == torch.float64 != dtype:  # autocast does not round it either
        raise InputError(f"waveforms must be {dtype}, not torch.float64")
    if lengths is None:
        return None
    counted = torch.as_tensor(lengths)
    if counted.is_floating_point() or counted.dtype == torch.bool:
        raise InputError(f"lengths must be integers, not {counted.dtype}")
    if counted.shape != waveforms.shape[:1]:
        raise InputError(f"lengths must be ({waveforms.shape[0]},), not of shape {tuple(counted.shape)}")
    return counted


def _check_lengths(lengths: Tensor, samples: int, shapes: Sequence[tuple[int, int, int]]) -> None:
    for row, length in enumerate(lengths.tolist()):
        if length > samples:
            raise InputError(f"row {row}: length {length} is more than the {samples} samples there are")
        if conv_length(shapes, length) < 1:
            raise InputError(f"row {row}: {length} samples are too short, they do not fill one frame")


def _check_variances(variances: list[float], *, normalize: bool) -> None:
    """Refuse rows whose samples are not finite; warn of those that are very quiet."""
    for row, variance in enumerate(variances):
        if not math.isfinite(variance):
            raise InputError(f"row {row}: samples that are NaN or infinite, or so large that their squares are")
        if normalize:
            warn_if_quiet(variance)


def _check_size(cfg: DinoSRConfig) -> None:
    """Refuse a model that does not fit into memory; the message names the settings of its largest part."""
    if torch.empty(0).device.type != "cpu":  # on "meta" they take no memory, and elsewhere not ours
        return
    dim, shapes, depth = cfg.encoder_embed_dim, cfg.extractor_conv_layer_config, cfg.encoder_pos_conv_depth
    channels = [1, *(width for width, _, _ in shapes)]
    convs = sum(before * width * kernel for before, (width, kernel, _) in zip(channels, shapes, strict=False))
    kernel = max(3, cfg.encoder_pos_conv_kernel // depth)
    blocks = cfg.encoder_num_layers * dim * (4 * dim + 2 * cfg.encoder_ff_interm_features)
    parts = {
        "extractor_conv_layer_config": convs + channels[-1] * dim,
        # Student and teacher.
        "encoder_embed_dim encoder_num_layers encoder_ff_interm_features": 2 * blocks,
        "encoder_embed_dim encoder_pos_conv_kernel encoder_pos_conv_depth encoder_pos_conv_groups": 2
        * (depth * kernel * (dim * dim // cfg.encoder_pos_conv_groups)),
        # Heads, codebooks and the statistics of a step.
        "codebook_size num_codebooks encoder_embed_dim": 3 * cfg.codebook_size * cfg.num_codebooks * dim,
    }
    largest = max(parts, key=lambda names: parts[names])
    settings = ", ".join(f"{name} = {getattr(cfg, name)}" for name in largest.split())
    check_memory(4 * sum(parts.values()), f"a model of {settings}")

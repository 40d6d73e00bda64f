"""DinoSR: a student predicts, for masked frames, the codewords that its EMA teacher's layers are assigned to.

Source: Liu, Chang, Auli, Hsu, Glass. DinoSR: Self-Distillation and Online Clustering for Self-supervised Speech
Representation Learning. NeurIPS 2023 (arXiv 2305.10005).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spidr.config import SAMPLE_RATE, DinoSRConfig
from spidr.models.codebook import Codebook, StepStatistics, assign, count_perplexity, standardise
from spidr.models.extractor import FeatureExtractor, FeatureProjection
from spidr.models.kernels import Dropout
from spidr.models.long import Read, window_frames, windows
from spidr.models.transformer import Transformer
from spidr.tools.errors import InputError
from spidr.tools.frames import conv_length
from spidr.tools.untrusted import check_memory

Reduction = Callable[[Tensor], None]
"""Sums a tensor over all processes, in place."""


def ema_scheduler(step: int, start_decay: float, final_decay: float, final_step: int, freeze_step: int) -> float:
    """Teacher decay of DinoSR after optimiser step ``step`` (counted from 1).

    Linear from ``start_decay`` to ``final_decay`` at ``final_step``, constant until ``freeze_step``, then 1.
    """
    if step < final_step:
        return start_decay + (final_decay - start_decay) * step / final_step
    return final_decay if step < freeze_step else 1.0


class DinoSR(nn.Module):
    """Feature extractor, student, teacher, heads and codebooks.

    A training step is ``loss, outputs = model(waveforms, mask=mask)``, backward and optimiser step on the mean of
    ``loss``, then ``model.update_ema(step)`` with ``step`` counted from 1, which also applies the codebook statistics
    that the forward passes since the last call have gathered.

    Waveforms are 16 kHz; they are taken as they are, so standardise each utterance first (mean 0, variance 1).

    Attributes:
        reduction: Sums the statistics of a step over processes, in place. None: over the default process group if there
            is one. With a reduction set, the perplexities that ``forward`` returns are of this process only.
    """

    config_class: ClassVar[type[DinoSRConfig]] = DinoSRConfig
    best_layer: int = 5
    """The layer, counted from 1, whose units are the most phonetic in the base model."""
    current_step: Tensor

    def __init__(self, cfg: DinoSRConfig | None = None) -> None:
        super().__init__()
        cfg = self.config_class() if cfg is None else cfg
        if not isinstance(cfg, self.config_class):
            raise TypeError(f"{type(self).__name__} needs a {self.config_class.__name__}, not a {type(cfg).__name__}")
        self.cfg = cfg
        _check_size(cfg)
        dim, shapes = cfg.encoder_embed_dim, cfg.extractor_conv_layer_config
        self.mask_embedding = nn.Parameter(torch.empty(dim).uniform_())
        self.register_buffer("current_step", torch.zeros(1, dtype=torch.int64))
        self.feature_extractor = FeatureExtractor(cfg.extractor_mode, shapes, bias=cfg.extractor_conv_bias)
        self.feature_projection = FeatureProjection(shapes[-1][0], dim)
        self.projection_dropout = Dropout(cfg.encoder_projection_dropout)
        self.student = Transformer(cfg)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, cfg.codebook_size), nn.LogSoftmax(dim=-1)) for _ in range(cfg.num_codebooks)
        )
        self.codebooks = nn.ModuleList(Codebook(cfg.codebook_size, dim) for _ in range(cfg.num_codebooks))
        self.teacher = Transformer(cfg)
        self.teacher.pos_conv_embed.load_state_dict(self.student.pos_conv_embed.state_dict())
        self.teacher.requires_grad_(False).eval()
        self.statistics = StepStatistics(cfg.num_codebooks, cfg.codebook_size, dim)
        self.reduction: Reduction | None = None
        self.extractor_frozen = False
        self._reduced = False

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks K; codebook ``k`` belongs to layer ``num_layers - K + k`` (from 0)."""
        return len(self.codebooks)

    @property
    def codebook_layers(self) -> range:
        """The layers that have a codebook, counted from 1: the last K."""
        last = len(self.student.layers)
        return range(last - self.num_codebooks + 1, last + 1)

    def _codebooks(self) -> list[Codebook]:
        return [cast("Codebook", codebook) for codebook in self.codebooks]

    def train(self, mode: bool = True) -> DinoSR:
        """Set training mode. The teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def drop_teacher(self) -> Self:
        """Free the teacher, which only training needs: ``forward`` raises an InputError from then on."""
        self.teacher = _NoTeacher()
        return self

    # ------------------------------------------------------------------------------------------------- inputs

    def project(
        self, waveforms: Tensor, attention_mask: Tensor | None = None, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Projected features of a batch, and the attention mask to use with them.

        Args:
            waveforms: (B, S) float.
            attention_mask: Boolean, True where to attend, broadcastable to (B, 1, T, T).
            lengths: Samples that count in each row, (B,). Spares the caller the mask; in group-norm mode it also keeps
                the padding out of the first layer's statistics, which ``attention_mask`` alone does not. With both, the
                lengths are not checked (a check would wait for the device).

        Returns:
            (B, T, D) and the mask, or None if every frame exists.

        Raises:
            InputError: If the shapes are others, the samples are no floats, or a length gives no frame or exceeds S.
        """
        lengths = _check_waveforms(waveforms, lengths, self.mask_embedding.dtype)
        shapes, samples = self.feature_extractor.shapes, waveforms.shape[1]
        if lengths is not None:
            if attention_mask is None:
                self._check_lengths(lengths, samples)
            lengths = lengths.to(waveforms.device)
            if attention_mask is None:
                frames = torch.arange(conv_length(shapes, samples), device=waveforms.device)
                attention_mask = (frames < conv_length(shapes, lengths).unsqueeze(1))[:, None, None]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.extractor_frozen):
            return self.feature_projection(self.feature_extractor(waveforms, lengths)), attention_mask

    def _check_lengths(self, lengths: Tensor, samples: int) -> None:
        for row, length in enumerate(lengths.tolist()):
            if length > samples:
                raise InputError(f"row {row}: length {length} is more than the {samples} samples there are")
            if conv_length(self.feature_extractor.shapes, length) < 1:
                raise InputError(f"row {row}: {length} samples are too short, they do not fill one frame")

    # ------------------------------------------------------------------------------------------------- training

    def forward(
        self,
        waveforms: Tensor,
        *,
        mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        channel_mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Predict the codewords of the masked frames.

        Args:
            waveforms: (B, S) float, 16 kHz.
            mask: The masked frames: boolean (B, T), True = masked, or their indices, int64 (B, M), which costs no
                synchronisation with the device. None: nothing is masked and the loss covers every frame.
            attention_mask: Boolean, True where to attend, broadcastable to (B, 1, T, T).
            lengths: See :meth:`project`.
            channel_mask: Boolean (B, D), True where a channel of the student's input is zeroed over all frames.

        Returns:
            The loss of each masked frame, (N,), row by row: the mean over codebooks of the cross-entropy with the
            assigned codeword. And ``target_ppl`` and ``pred_ppl``, 0-dim: 2 to the entropy of the mean assignment and
            of the mean prediction over the masked frames, averaged over codebooks; ``target_ppls``, ``pred_ppls`` and
            ``active_codewords`` are (K,).
        """
        features, attention_mask = self.project(waveforms, attention_mask, lengths)
        batch, num_frames, dim = features.shape
        student_input, index = self.projection_dropout(features), None
        if mask is not None:
            if mask.dtype == torch.bool:
                masked, index = mask, mask.flatten().nonzero().squeeze(1)
            else:
                masked = torch.zeros(batch, num_frames, dtype=torch.bool, device=mask.device).scatter_(1, mask, True)
                index = (mask + num_frames * torch.arange(batch, device=mask.device).unsqueeze(1)).flatten()
            student_input = torch.where(
                masked.unsqueeze(-1), self.mask_embedding.to(student_input.dtype), student_input
            )
        if channel_mask is not None:
            student_input = student_input.masked_fill(channel_mask.unsqueeze(1), 0)

        def select(x: Tensor) -> Tensor:
            x = x.reshape(-1, dim)
            return x if index is None else x.index_select(0, index)

        targets, labels = self._targets(features, attention_mask, select)
        hidden = self._hidden(student_input, attention_mask, self.num_codebooks)
        logits = self._logits([select(h) for h in hidden], self.num_codebooks)
        with torch.autocast(logits.device.type, enabled=False):
            log_probs = F.log_softmax(logits.float(), dim=-1)
            loss = -log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1).mean(0)
            with torch.no_grad():
                predicted = log_probs.exp().sum(1)
                outputs = self._perplexities(labels, predicted)
                if self.training:
                    self.statistics.add(targets, labels, predicted, loss)
        return loss, outputs

    @torch.no_grad()
    def _targets(
        self, features: Tensor, attention_mask: Tensor | None, select: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Selected teacher frames in float32, (K, N, D), and the codewords they are assigned to, (K, N)."""
        outputs = self.teacher.get_intermediate_outputs(
            features, attention_mask, skip=len(self.teacher.layers) - self.num_codebooks
        )
        with torch.autocast(features.device.type, enabled=False):
            targets = torch.stack([select(standardise(output)) for output in outputs])
            return targets, assign(targets, torch.stack([codebook.codewords for codebook in self._codebooks()]))

    def _hidden(self, x: Tensor, attention_mask: Tensor | None, num_heads: int, skip: int = 0) -> list[Tensor]:  # noqa: ARG002
        """What the first ``num_heads`` heads but ``skip`` read: one (B, T, D) for all of them, or one for each."""
        return [self.student(x, attention_mask)]

    def _logits(self, hidden: list[Tensor], num_heads: int) -> Tensor:
        """The first K = ``num_heads`` heads in one product: K tensors (..., D), or one for all, to (K, ..., V)."""
        heads = [cast("nn.Linear", cast("nn.Sequential", head)[0]) for head in self.heads[:num_heads]]
        weight, bias = torch.stack([h.weight for h in heads]), torch.stack([h.bias for h in heads])
        if len(hidden) == 1:
            return F.linear(hidden[0], weight.flatten(0, 1), bias.flatten()).unflatten(-1, bias.shape).movedim(-2, 0)
        logits = torch.baddbmm(bias.unsqueeze(1), torch.stack(hidden).flatten(1, -2), weight.transpose(1, 2))
        return logits.unflatten(1, hidden[0].shape[:-1])

    def _perplexities(self, labels: Tensor, predicted: Tensor) -> dict[str, Tensor]:
        """Perplexities over the frames of all processes, or of this one if a reduction was handed over."""
        assigned = torch.zeros_like(predicted).scatter_add_(1, labels, torch.ones_like(labels, dtype=predicted.dtype))
        counts = torch.stack([assigned, predicted])
        if self.reduction is None:
            _reduce_over_default_group(counts)
        assigned, predicted = counts
        target_ppls, pred_ppls = count_perplexity(assigned), count_perplexity(predicted)
        return {
            "target_ppl": target_ppls.mean(),
            "pred_ppl": pred_ppls.mean(),
            "target_ppls": target_ppls,
            "pred_ppls": pred_ppls,
            "active_codewords": (assigned > 0).sum(-1),
        }

    def reduce_statistics(self) -> dict[str, Tensor]:
        """Sum the step's statistics over all processes, once, and return them by name (see ``StepStatistics``).

        The only collective of a step beside the gradients'. Without a call, :meth:`update_ema` does it.
        """
        if not self._reduced:
            (self.reduction or _reduce_over_default_group)(self.statistics.flat)
            self._reduced = True
        return self.statistics.view()

    def discard_statistics(self) -> None:
        """Forget the statistics gathered since the last update, as after a step that was skipped."""
        self.statistics.flat.zero_()
        self._reduced = False

    def ema_decay(self, step: int) -> float:
        """Teacher decay after optimiser step ``step``."""
        cfg = self.cfg
        return ema_scheduler(step, cfg.ema_start_decay, cfg.ema_final_decay, cfg.ema_final_step, cfg.freeze_step)

    @torch.no_grad()
    def update_ema(self, step: int) -> float:
        """End optimiser step ``step`` (counted from 1): update codebooks and teacher, freeze the extractor when due.

        Returns:
            The teacher decay that was used; outside (0, 1) the teacher has not changed.
        """
        if self.cfg.codebook_decay < 1:
            totals = self.reduce_statistics()
            for codebook, sums, assigned in zip(self._codebooks(), totals["sums"], totals["assigned"], strict=True):
                codebook.update(sums, assigned, self.cfg.codebook_decay)
                if self.cfg.codebook_revive_after > 0:
                    codebook.revive(assigned, self.cfg.codebook_revive_after)
        self.discard_statistics()
        decay = self.ema_decay(step)
        if 0 < decay < 1:
            copied, averaged = self._teacher_student_pairs()
            # The multi-tensor operations refuse to do nothing.
            if copied[0]:
                torch._foreach_copy_(*copied)
            if averaged[0]:
                torch._foreach_lerp_(*averaged, 1 - decay)
        self.current_step.fill_(step)
        if step >= self.cfg.freeze_step:
            self.freeze_extractor()
        return decay

    def _teacher_student_pairs(self) -> tuple[tuple[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]:
        """(teacher's, student's) tensors to copy, and to average."""
        copied: tuple[list[Tensor], list[Tensor]] = ([], [])
        averaged: tuple[list[Tensor], list[Tensor]] = ([], [])
        pairs = zip(self.teacher.named_parameters(), self.student.parameters(), strict=True)
        for (name, teacher), student in pairs:
            excluded = any(name.startswith(prefix) for prefix in self.cfg.ema_exclude_layers)
            for group, parameter in zip(copied if excluded else averaged, (teacher, student), strict=True):
                group.append(parameter)
        return copied, averaged

    def freeze_extractor(self) -> None:
        """Stop training the feature extractor and the projection: no gradient, no backward pass through them."""
        self.extractor_frozen = True
        for module in (self.feature_extractor, self.feature_projection):
            module.requires_grad_(False)
            for parameter in module.parameters():
                parameter.grad = None

    @torch.no_grad()
    def init_codebooks(
        self,
        waveforms: Tensor,
        *,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Take the first codewords from frames of the teacher, drawn at random without replacement.

        Args:
            waveforms: (B, S) float, with at least as many frames as there are codewords.
            attention_mask: As in :meth:`forward`; frames that do not exist are not drawn.
            lengths: As in :meth:`project`.
            generator: On the CPU.

        Raises:
            InputError: If there are fewer frames than codewords.
        """
        features, attention_mask = self.project(waveforms, attention_mask, lengths)
        batch, num_frames, dim = features.shape
        exists = torch.ones(batch, 1, num_frames, dtype=torch.bool)
        if attention_mask is not None:
            exists = attention_mask[..., 0, :].expand(batch, 1, num_frames).cpu()
        frames = exists.flatten().nonzero().squeeze(1)
        size = self.cfg.codebook_size
        if len(frames) < size:
            raise InputError(f"{len(frames)} frames are too few to draw {size} codewords from: use larger batches")
        drawn = frames[torch.randperm(len(frames), generator=generator)[:size]].to(features.device)
        targets, _ = self._targets(features, attention_mask, lambda x: x.reshape(-1, dim)[drawn])
        for codebook, codewords in zip(self._codebooks(), targets, strict=True):
            codebook.codebook.copy_(codewords)
            codebook.counts.fill_(1.0)

    # ------------------------------------------------------------------------------------------------- inference

    def get_intermediate_outputs(
        self,
        waveforms: Tensor,
        *,
        attention_mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        num_layers: int | None = None,
        before_residual: bool = True,
    ) -> list[Tensor]:
        """Outputs of the student's layers.

        Args:
            waveforms: (B, S) float, 16 kHz.
            attention_mask: Boolean, True where to attend, broadcastable to (B, 1, T, T).
            lengths: See :meth:`project`.
            num_layers: Run the first layers only.
            before_residual: Give each block's feed-forward output before the residual addition, which the heads read in
                SpidR, instead of the block's full output.

        Returns:
            One (B, T, D) tensor a layer.
        """
        features, attention_mask = self.project(waveforms, attention_mask, lengths)
        return self.student.get_intermediate_outputs(
            features, attention_mask, num_layers, before_residual=before_residual
        )

    def get_codebooks(
        self,
        waveform: Tensor,
        *,
        attention_mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        num_layers: int | None = None,
        onehot: bool = False,
    ) -> list[Tensor | None]:
        """Codeword probabilities of each layer; their argmax is the layer's unit.

        Args:
            waveform: (B, S) float, 16 kHz.
            attention_mask: Boolean, True where to attend, broadcastable to (B, 1, T, T).
            lengths: See :meth:`project`.
            num_layers: Give the first layers only.
            onehot: Give one-hot vectors of the most likely codeword, int64, instead of probabilities, float32.

        Returns:
            One entry a layer: None for the first layers, which have no codebook, then (B, T, V).
        """
        total = len(self.student.layers)
        num_layers = total if num_layers is None else num_layers
        if not 1 <= num_layers <= total:
            raise ValueError(f"num_layers must be between 1 and {total}, not {num_layers}")
        num_heads = num_layers - (total - self.num_codebooks)
        if num_heads < 1:
            return [None] * num_layers
        features, attention_mask = self.project(waveform, attention_mask, lengths)
        logits = self._logits(self._hidden(features, attention_mask, num_heads), num_heads)
        one_hot = F.one_hot(logits.argmax(-1), self.cfg.codebook_size) if onehot else None
        per_head = logits.float().softmax(-1) if one_hot is None else one_hot
        return [*[None] * (num_layers - num_heads), *per_head]

    @torch.no_grad()
    def encode(
        self,
        waveforms: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
        *,
        layer: int | None = None,
        normalize: bool = True,
        window: float | None = None,
        context: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Features of a batch of utterances, one every 20 ms with the default convolutions.

        An utterance of any length goes through as a whole: memory grows with T, but the time for attention with T².
        With ``window``, time and memory of the transformer do not: its layers see a window and its context at a time,
        so features differ a little from those of the whole.

        Args:
            waveforms: (B, S) float, 16 kHz, shorter rows padded at the end.
            lengths: Samples of each row, (B,); None: all of them.
            layer: Counted from 1; None: :attr:`best_layer`.
            normalize: Standardise each utterance over its own samples, as in training. ``forward`` and the ``get_*``
                methods never do.
            window: Seconds of features that are computed at a time; utterances that are not longer are not affected.
            context: Seconds that are seen on each side of a window; None: a quarter of it.

        Returns:
            The layer's output before the residual addition, (B, T, D), and the frames of each row, (B,). Frame ``t`` is
            about the 25 ms from ``t * 20`` ms on. With ``window``, features in the padding are 0.

        Raises:
            InputError: If there is no such layer, the waveforms are not as they should be, a length gives no frame or
                exceeds S, or a window or context is no number of frames.
        """
        output = partial(self.layer_output, layer=self._layer(layer))
        return self._windowed(output, waveforms, lengths, window, context, normalize=normalize)

    @torch.no_grad()
    def units(
        self,
        waveforms: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
        *,
        layer: int | None = None,
        normalize: bool = True,
        window: float | None = None,
        context: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Discrete units of a batch of utterances: the most likely codewords of a layer.

        Args:
            waveforms: See :meth:`encode`, as for the other arguments.
            lengths: Samples of each row.
            layer: One that has a codebook.
            normalize: Standardise each utterance.
            window: Seconds of units that are computed at a time.
            context: Seconds that are seen on each side of a window.

        Returns:
            (B, T) int64, -1 in the padding, and the frames of each row, (B,).

        Raises:
            InputError: If the layer has no codebook, or as :meth:`encode`.
        """
        layer = self._layer(layer)
        first = self.codebook_layers.start
        if layer < first:
            raise InputError(f"layer {layer} has no codebook; layers {first} to {len(self.student.layers)} have one")

        def units(features: Tensor, attention_mask: Tensor | None) -> Tensor:
            return self.unit_logits(features, attention_mask, layer).argmax(-1)

        found, frame_lengths = self._windowed(units, waveforms, lengths, window, context, normalize=normalize)
        padding = torch.arange(found.shape[1], device=found.device) >= frame_lengths.unsqueeze(1)
        return found.masked_fill(padding, -1), frame_lengths

    def _windowed(
        self,
        function: Callable[[Tensor, Tensor | None], Tensor],
        waveforms: Tensor,
        lengths: Tensor | Sequence[int] | None,
        window: float | None,
        context: float | None,
        *,
        normalize: bool,
    ) -> tuple[Tensor, Tensor]:
        """What a function of (projected features, attention mask) gives, on windows of each row if asked for.

        Returns:
            That, and the frames of each row.
        """
        if window is None and context is not None:
            raise InputError(f"context = {context} s needs to be at least 0 and goes with a window")
        size, around = (None, 0) if window is None else window_frames(window, context, self.frame_seconds)
        x, frame_lengths = self._utterances(waveforms, lengths, normalize=normalize)
        if size is None or int(frame_lengths.max()) <= size:
            x, attention_mask = self.project(x, lengths=lengths)
            return function(x, attention_mask), frame_lengths
        counts = torch.full((len(x),), x.shape[1]) if lengths is None else torch.as_tensor(lengths)
        self._check_lengths(counts, x.shape[1])
        rows = []
        for row, count in zip(x, counts.tolist(), strict=True):
            parts = self.windows(partial(_samples, row), count, function, size=size, context=around)
            rows.append(torch.cat([*parts], 1)[0])
        out = rows[0].new_zeros(len(rows), conv_length(self.feature_extractor.shapes, x.shape[1]), *rows[0].shape[1:])
        for row, values in enumerate(rows):
            out[row, : len(values)] = values
        return out, frame_lengths

    @property
    def frame_seconds(self) -> float:
        """Seconds from one frame to the next."""
        return math.prod(stride for _, _, stride in self.feature_extractor.shapes) / SAMPLE_RATE

    def layer_output(self, features: Tensor, attention_mask: Tensor | None, layer: int) -> Tensor:
        """A layer's output before the residual addition, (B, T, D), from projected features (see :meth:`project`)."""
        return self.student.get_intermediate_outputs(features, attention_mask, layer, skip=layer - 1)[0]

    def unit_logits(self, features: Tensor, attention_mask: Tensor | None, layer: int) -> Tensor:
        """What the head of a layer gives before its softmax, (B, T, V), from projected features."""
        index = layer - self.codebook_layers.start
        head = cast("nn.Sequential", self.heads[index])[0]
        return head(self._hidden(features, attention_mask, index + 1, index)[0])

    def windows(
        self, read: Read, num_samples: int, function: Callable[[Tensor, None], Tensor], *, size: int, context: int
    ) -> Iterator[Tensor]:
        """See :func:`spidr.models.long.windows`."""
        extractor = self.feature_extractor
        whole = extractor.mode == "group_norm"
        yield from windows(
            lambda x: self.project(x)[0], extractor.shapes, read, num_samples, function,
            size=size, context=context, whole=whole,
        )  # fmt: skip

    def _layer(self, layer: int | None) -> int:
        layer, total = self.best_layer if layer is None else layer, len(self.student.layers)
        if not 1 <= layer <= total:
            raise InputError(f"layer must be between 1 and {total}, not {layer}")
        return layer

    def _utterances(
        self, waveforms: Tensor, lengths: Tensor | Sequence[int] | None, *, normalize: bool
    ) -> tuple[Tensor, Tensor]:
        """The waveforms, standardised if asked for, and the number of frames of each."""
        lengths = _check_waveforms(waveforms, lengths, self.mask_embedding.dtype)
        batch, samples = waveforms.shape
        given = (torch.full((batch,), samples) if lengths is None else lengths).to(waveforms.device)
        if normalize:
            exists = torch.arange(samples, device=waveforms.device) < given.unsqueeze(1)
            count = given.unsqueeze(1)
            # In float64, so that neither the padding nor the number of threads changes a bit. (MPS has none.)
            exact = torch.float32 if waveforms.device.type == "mps" else torch.float64
            mean = (waveforms * exists).sum(1, keepdim=True, dtype=exact) / count
            centred = (waveforms - mean.to(waveforms.dtype)) * exists
            var = centred.square().sum(1, keepdim=True, dtype=exact) / count
            waveforms = centred * torch.rsqrt(var + 1e-5).to(waveforms.dtype)
        return waveforms, conv_length(self.feature_extractor.shapes, given)


def _samples(row: Tensor, start: int, stop: int) -> Tensor:
    return row[start:stop].unsqueeze(0)


def _check_waveforms(waveforms: Tensor, lengths: Tensor | Sequence[int] | None, dtype: torch.dtype) -> Tensor | None:
    """Refuse what is no batch of waveforms for a model of that type; values are not looked at.

    Returns:
        The lengths as a tensor.
    """
    if waveforms.ndim != 2:
        raise InputError(f"waveforms must be (batch, samples), not of shape {tuple(waveforms.shape)}")
    if not waveforms.is_floating_point():
        raise InputError(f"waveforms must be floats, about -1 to 1, not {waveforms.dtype}")
    if waveforms.dtype == torch.float64 != dtype:  # autocast does not round it either
        raise InputError(f"waveforms must be {dtype}, not torch.float64")
    if lengths is None:
        return None
    lengths = torch.as_tensor(lengths)
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise InputError(f"lengths must be integers, not {lengths.dtype}")
    if lengths.shape != waveforms.shape[:1]:
        raise InputError(f"lengths must be ({waveforms.shape[0]},), not of shape {tuple(lengths.shape)}")
    return lengths


def _check_size(cfg: DinoSRConfig) -> None:
    """Refuse a model whose weights cannot be had, before the machine runs out of memory.

    Raises:
        InputError: It names the settings of the part that takes the most.
    """
    if torch.get_default_device().type != "cpu":  # on "meta" they take no memory, and elsewhere not ours
        return
    dim, shapes = cfg.encoder_embed_dim, cfg.extractor_conv_layer_config
    channels = [1, *(width for width, _, _ in shapes)]
    kernel = max(3, cfg.encoder_pos_conv_kernel // cfg.encoder_pos_conv_depth)
    widths = ("encoder_embed_dim", "encoder_num_layers", "encoder_ff_interm_features")
    parts: dict[tuple[str, ...], int] = {
        ("extractor_conv_layer_config",): sum(channels[i] * n * k for i, (n, k, _) in enumerate(shapes))
        + channels[-1] * dim,
        # Student and teacher.
        widths: 2 * cfg.encoder_num_layers * dim * (4 * dim + 2 * cfg.encoder_ff_interm_features),
        ("encoder_embed_dim", "encoder_pos_conv_kernel", "encoder_pos_conv_depth", "encoder_pos_conv_groups"): 2
        * cfg.encoder_pos_conv_depth
        * kernel
        * (dim * dim // cfg.encoder_pos_conv_groups),
        # Heads, codebooks and the statistics of a step.
        ("codebook_size", "num_codebooks", "encoder_embed_dim"): 3 * cfg.codebook_size * cfg.num_codebooks * dim,
    }
    largest = max(parts, key=lambda names: parts[names])
    settings = ", ".join(f"{name} = {getattr(cfg, name)}" for name in largest)
    check_memory(4 * sum(parts.values()), f"a model of {settings}")


class _NoTeacher(Transformer):
    """Stands where a teacher was: no weights, no outputs."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layers = nn.ModuleList()

    def get_intermediate_outputs(self, *_: object, **__: object) -> list[Tensor]:
        raise InputError("this model has no teacher: it encodes, but cannot be trained or validated")


def _reduce_over_default_group(x: Tensor) -> None:
    """Sum over the default process group, if there is one of several ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)

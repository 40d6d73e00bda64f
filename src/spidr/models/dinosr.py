"""DinoSR: a student predicts, for masked frames, the codewords that its EMA teacher's layers are assigned to.

Source: Liu, Chang, Auli, Hsu, Glass. DinoSR: Self-Distillation and Online Clustering for Self-supervised Speech
Representation Learning. NeurIPS 2023 (arXiv 2305.10005).
"""

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Self, cast

import torch
from torch import Tensor, nn

from spidr.config import DinoSRConfig
from spidr.models.codebook import Codebook, StepStatistics, all_reduce, assign, count_perplexity, normalise_over_time
from spidr.models.encoder import Encoder, Lengths
from spidr.models.kernels import Dropout, untouched, without_autocast
from spidr.models.transformer import Transformer, frame_mask
from spidr.tools.errors import InputError

Reduction = Callable[[Tensor], None]
"""Sums a tensor over all processes, in place."""


def ema_scheduler(step: int, start_decay: float, final_decay: float, final_step: int, freeze_step: int) -> float:
    """Teacher decay of DinoSR after optimiser step ``step`` (counted from 1).

    Linear from ``start_decay`` to ``final_decay`` at ``final_step``, constant until ``freeze_step``, then 1.
    """
    if step < final_step:
        return start_decay + (final_decay - start_decay) * step / final_step
    return final_decay if step < freeze_step else 1.0


class DinoSR(Encoder):
    """An encoder and what training adds: teacher, codebooks, loss, moving averages.

    A training step is ``loss, outputs = model(waveforms, mask=mask)``, backward and optimiser step on the mean of
    ``loss``, then ``model.update_ema(step)`` with ``step`` counted from 1. Standardise the waveforms first.

    Args:
        cfg: Settings of the model; None: the base model.

    Attributes:
        teacher: None in a model that only encodes.
        freeze_step: The step at which the extractor and the projection are frozen.
        ema_scheduler: Teacher decay after a step.
        teacher_exclude_layers: Names of the teacher's parameters that are copied, not averaged.
        defer_codebook_updates: Every forward in training mode updates the codebooks before it returns. True: it only
            gathers statistics, and :meth:`update_ema` applies them, once for all micro-batches of a step; the
            perplexities that ``forward`` returns are then those of this process.
        reduction: Sums the statistics of a step over processes, in place. None: over the default process group if there
            is one.
    """

    current_step: Tensor
    teacher: Transformer | None

    def __init__(self, cfg: DinoSRConfig | None = None) -> None:
        super().__init__(cfg)
        cfg = self.cfg
        self.register_buffer("current_step", torch.zeros(1, dtype=torch.int64))
        self.projection_dropout = Dropout(cfg.encoder_projection_dropout)
        self.codebooks = nn.ModuleList(
            Codebook(cfg.encoder_embed_dim, cfg.codebook_size, cfg.codebook_decay) for _ in range(cfg.num_codebooks)
        )
        for codebook in self.codebooks:
            cast("Codebook", codebook).managed = True
        self.teacher = Transformer.build(cfg)
        self.teacher.pos_conv_embed.load_state_dict(self.student.pos_conv_embed.state_dict())
        self.teacher.requires_grad_(False).eval()
        self.teacher_exclude_layers = {
            name for name, _ in self.teacher.named_parameters() if name.startswith(tuple(cfg.ema_exclude_layers))
        }
        self.freeze_step = cfg.freeze_step
        self.ema_scheduler = self._ema_scheduler()
        self.statistics = StepStatistics(cfg.num_codebooks, cfg.codebook_size, cfg.encoder_embed_dim)
        self.defer_codebook_updates = False
        self.reduction: Reduction | None = None
        self._reduced = False

    def _ema_scheduler(self) -> Callable[[int], float]:
        cfg = self.cfg
        return partial(
            ema_scheduler,
            start_decay=cfg.ema_start_decay,
            final_decay=cfg.ema_final_decay,
            final_step=cfg.ema_final_step,
            freeze_step=cfg.freeze_step,
        )

    def train(self, mode: bool = True) -> Self:
        """Set training mode. The teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def drop_teacher(self) -> Self:
        """Free the teacher, which only training needs: ``forward`` raises an InputError from then on."""
        self.teacher = None
        return self

    # ------------------------------------------------------------------------------------------------- the loss

    def forward(
        self,
        waveforms: Tensor,
        *,
        mask: Tensor | None = None,
        mask_indices: Tensor | None = None,
        attention_mask: Tensor | None = None,
        lengths: Lengths | None = None,
        channel_mask: Tensor | None = None,
        frames: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Predict the codewords of the masked frames. In training mode, then move the codebooks.

        Args:
            waveforms: (B, S) float, 16 kHz.
            mask: The masked frames: boolean (B, T), True = masked, or their indices, int64 (B, M), which costs no
                synchronisation with the device. None: nothing is masked and the loss covers every frame.
            mask_indices: Another name for ``mask``.
            attention_mask: Boolean, True where to attend, broadcastable to (B, 1, T, T).
            lengths: See :meth:`project`.
            channel_mask: Boolean (B, D), True where a channel of the student's input is zeroed over all frames.
            frames: See :meth:`project`.
            labels: What :meth:`labels` gives for the features, if it is known already; codebooks must not move then.

        Returns:
            The loss of each masked frame, (N,), row by row: the mean over codebooks of the cross-entropy with the
            assigned codeword. And ``target_ppl`` and ``pred_ppl``, 0-dim: 2 to the entropy of the mean assignment and
            of the mean prediction over the masked frames of all processes, averaged over codebooks; ``target_ppls``,
            ``pred_ppls`` and ``active_codewords`` are (K,).

        Raises:
            InputError: If the model has no teacher, or ``mask`` and ``mask_indices`` are both given.
        """
        mask = _one_mask(mask, mask_indices)
        features, attention_mask = self.project(waveforms, attention_mask, lengths, frames)
        batch, num_frames, _ = features.shape
        student_input, index = self.projection_dropout(features), None
        if mask is not None:
            masked = mask_from_index(mask, num_frames)
            if mask.dtype == torch.bool:
                index = mask.flatten().nonzero().squeeze(1)
            else:
                index = (mask + num_frames * torch.arange(batch, device=mask.device).unsqueeze(1)).flatten()
            embedding = self.mask_embedding.to(student_input.dtype)
            student_input = torch.where(masked.unsqueeze(-1), embedding, student_input)
        if channel_mask is not None:
            student_input = student_input.masked_fill(channel_mask.unsqueeze(1), 0)

        def select(x: Tensor) -> Tensor:
            x = x.flatten(0, 1)
            return x if index is None else x.index_select(0, index)

        targets, one_hot = None, None
        if labels is None:
            targets = self._targets(features, attention_mask, select)
            labels, one_hot = self._assign(targets)
        else:
            labels = torch.stack([select(found) for found in labels])
        hidden = self._hidden(student_input, attention_mask, self.num_codebooks)
        found = self._log_probs([select(h) for h in hidden], self.num_codebooks)
        log_probs = found if isinstance(found, Tensor) else torch.stack(found)
        with without_autocast(log_probs):
            if one_hot is None:
                loss = -log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1).mean(0)
            else:
                loss = -(one_hot * log_probs).sum(-1).mean(0)
            with torch.no_grad():
                return loss, self._measure(targets, labels, log_probs.exp().sum(1), loss)

    @torch.no_grad()
    def labels(self, features: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The codewords that the teacher's layers are assigned to, (K, B, T), from projected features (B, T, D)."""
        labels, _ = self._assign(self._targets(features, attention_mask, lambda x: x.flatten(0, 1)))
        return labels.unflatten(1, features.shape[:2])

    @torch.no_grad()
    def _targets(self, features: Tensor, attention_mask: Tensor | None, select: Callable[[Tensor], Tensor]) -> Tensor:
        """Selected teacher frames, normalised over time, in float32, (K, N, D)."""
        if self.teacher is None:
            raise InputError("this model has no teacher: it encodes, but cannot be trained or validated")
        skip = len(self.teacher.layers) - self.num_codebooks
        outputs = self.teacher.get_intermediate_outputs(features, attention_mask, skip=skip)
        with without_autocast(features):
            return torch.stack([select(normalise_over_time(output)) for output in outputs])

    @torch.no_grad()
    def _assign(self, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """The codewords that targets (K, N, D) are assigned to, (K, N).

        Codebooks that somebody has changed are called as modules; their output, (K, N, V), is returned, too.
        """
        with without_autocast(targets):
            if untouched(*self.codebooks):
                return assign(targets, torch.stack([cast("Codebook", c).codewords for c in self.codebooks])), None
            one_hot = torch.stack([codebook(x).float() for codebook, x in zip(self.codebooks, targets, strict=True)])
        return one_hot.argmax(-1), one_hot

    def _measure(self, targets: Tensor | None, labels: Tensor, predicted: Tensor, loss: Tensor) -> dict[str, Tensor]:
        """Measure how the masked frames use the codebooks; in training mode, gather statistics and move them."""
        if self.training:
            self.statistics.add(targets, labels, predicted, loss)
            if not self.defer_codebook_updates:
                totals = self.reduce_statistics()
                outputs = _perplexities(totals["assigned"], totals["predicted"])
                self._update_codebooks()
                return outputs
        assigned = torch.zeros_like(predicted).scatter_add_(1, labels, torch.ones_like(labels, dtype=predicted.dtype))
        counts = torch.stack([assigned, predicted])
        if self.reduction is None:
            all_reduce(counts)
        return _perplexities(*counts)

    # ------------------------------------------------------------------------------------------------- the step

    def reduce_statistics(self) -> dict[str, Tensor]:
        """Sum the step's statistics over all processes, once, and return them by name (see ``StepStatistics``).

        The only collective of a step besides the gradients'. :meth:`update_ema` calls it if nobody has.
        """
        if not self._reduced:
            (self.reduction or all_reduce)(self.statistics.flat)
            self._reduced = True
        return self.statistics.view()

    def discard_statistics(self) -> None:
        """Forget the statistics gathered since the last update, as after a skipped step."""
        self.statistics.flat.zero_()
        self._reduced = False

    def _update_codebooks(self) -> None:
        totals = self.reduce_statistics()
        for codebook, sums, assigned in zip(self._codebooks(), totals["sums"], totals["assigned"], strict=True):
            if codebook is not None and codebook.codebook_decay < 1:
                codebook.update(sums, assigned)
                if self.cfg.codebook_revive_after > 0:
                    codebook.revive(assigned, self.cfg.codebook_revive_after)
        self.discard_statistics()

    @torch.no_grad()
    def update_ema(self, step: int) -> float:
        """End optimiser step ``step`` (counted from 1): update the teacher, freeze the extractor when due.

        With ``defer_codebook_updates``, the codebooks are updated first.

        Returns:
            The teacher decay that was used; outside (0, 1) the teacher has not changed.
        """
        if self.defer_codebook_updates:
            self._update_codebooks()
        decay = self.ema_scheduler(step)
        if 0 < decay < 1:
            copied: tuple[list[Tensor], list[Tensor]] = [], []  # of the teacher, of the student
            averaged: tuple[list[Tensor], list[Tensor]] = [], []
            parameters = zip(
                cast("Transformer", self.teacher).named_parameters(), self.student.parameters(), strict=True
            )
            for (name, teacher), student in parameters:
                group = copied if name in self.teacher_exclude_layers else averaged
                group[0].append(teacher)
                group[1].append(student)
            # The multi-tensor operations refuse to do nothing.
            if copied[0]:
                torch._foreach_copy_(*copied)
            if averaged[0]:
                torch._foreach_lerp_(*averaged, 1 - decay)
        self.current_step.fill_(step)
        if step >= self.freeze_step:
            self.freeze_extractor()
        return decay

    def freeze_extractor(self) -> None:
        """Stop training the feature extractor and the projection: no gradient, no backward pass through them."""
        self.extractor_frozen = True
        for module in (self.feature_extractor, self.feature_projection):
            module.requires_grad_(False).zero_grad()

    @torch.no_grad()
    def init_codebooks(
        self,
        waveforms: Tensor,
        *,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw the first codewords from the teacher's frames, at random and without replacement.

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
        exists, size = frame_mask(features, attention_mask), self.cfg.codebook_size
        frames = torch.arange(batch * num_frames) if exists is None else exists.flatten().cpu().nonzero().squeeze(1)
        if len(frames) < size:
            raise InputError(f"{len(frames)} frames are too few to draw {size} codewords from: use larger batches")
        drawn = frames[torch.randperm(len(frames), generator=generator)[:size]].to(features.device)
        targets = self._targets(features, attention_mask, lambda x: x.reshape(-1, dim)[drawn])
        for codebook, codewords in zip(self._codebooks(), targets, strict=True):
            if codebook is not None:
                codebook.codebook.copy_(codewords)
                codebook.counts.fill_(1.0)

    def _codebooks(self) -> list[Codebook | None]:
        """Our codebook at each place, even inside a wrapper; None where another module has taken its place."""
        return [next((m for m in module.modules() if isinstance(m, Codebook)), None) for module in self.codebooks]


def mask_from_index(index: Tensor, size: int) -> Tensor:
    """Boolean mask (B, ``size``) of the frames in ``index (B, M)``; a boolean mask is returned as it is."""
    if index.dtype == torch.bool:
        return index
    return torch.zeros(len(index), size, dtype=torch.bool, device=index.device).scatter_(1, index, value=True)


def _one_mask(mask: Tensor | None, mask_indices: Tensor | None) -> Tensor | None:
    """The mask under whichever name it was given."""
    if mask is not None and mask_indices is not None:
        raise InputError("mask and mask_indices are two names of one argument: give one of them")
    if mask_indices is not None and mask_indices.dtype == torch.bool:
        _warn_of_boolean_indices()
    return mask if mask_indices is None else mask_indices


@cache
def _warn_of_boolean_indices() -> None:
    warnings.warn("mask_indices is a boolean mask: count masked frames with `mask.sum()`, not `numel()`", stacklevel=5)


def _perplexities(assigned: Tensor, predicted: Tensor) -> dict[str, Tensor]:
    """Perplexities of each codebook's counts, (K, V), and their means."""
    target_ppls, pred_ppls = count_perplexity(assigned), count_perplexity(predicted)
    return {
        "target_ppl": target_ppls.mean(),
        "pred_ppl": pred_ppls.mean(),
        "target_ppls": target_ppls,
        "pred_ppls": pred_ppls,
        "active_codewords": (assigned > 0).sum(-1),
    }

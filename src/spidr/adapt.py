"""What adapting a trained model to other speech adds to a run: how it begins, and what need not be computed twice."""

import logging
import re
from collections.abc import Hashable
from dataclasses import replace
from itertools import chain, count, islice
from typing import cast

import torch
from torch import Tensor, nn

from spidr.config import Config, DinoSRConfig
from spidr.data import Batch
from spidr.data.loader import SpeechLoader
from spidr.environment import Environment
from spidr.models import DinoSR
from spidr.models.codebook import Codebook
from spidr.models.hub import load_weights
from spidr.models.kernels import untouched
from spidr.tools.errors import InputError
from spidr.tools.frames import conv_length
from spidr.tools.untrusted import check_memory

logger = logging.getLogger(__name__)

HEADS_STEPS, HEADS_LR = 20, 5e-2  # how new heads are fitted, as in SpidR-Adapt


def truncated(model: DinoSRConfig) -> DinoSRConfig:
    """Cut a model's configuration after ``train_layers``, which must have a codebook: deeper layers are gone."""
    layers = getattr(model, "train_layers", None) or model.encoder_num_layers
    removed, last = model.encoder_num_layers - layers, model.encoder_num_layers
    if not 0 <= removed < model.num_codebooks:
        accepted = f"{last - model.num_codebooks + 1} to {last}"
        raise InputError(f"model.train_layers = {layers}: choose a layer that has a codebook, {accepted}")
    return replace(model, encoder_num_layers=layers, num_codebooks=model.num_codebooks - removed) if removed else model


def first_weights(cfg: Config) -> dict[str, Tensor]:
    """The weights of ``run.init_ckpt``, without the layers that ``model.train_layers`` cuts off.

    ``cfg.model`` is as :func:`spidr.state.model_settings` gives it. An export has no teacher: a copy of its student
    becomes the teacher.
    """
    source = cast("str", cfg.run.init_ckpt)
    model, weights = cfg.model, load_weights(source)
    if not any(name.startswith("teacher.") for name in weights):
        logger.warning("%s has no teacher, as exports have none: the teacher begins as a copy of the student", source)
        weights |= {n.replace("student.", "teacher.", 1): w for n, w in weights.items() if n.startswith("student.")}
    if getattr(model, "train_layers", None) is None:
        return weights
    layers, codebooks = model.encoder_num_layers, model.num_codebooks
    kept = {"student.layers": layers, "teacher.layers": layers, "heads": codebooks, "codebooks": codebooks}
    place = re.compile(rf"({'|'.join(map(re.escape, kept))})\.(\d+)\.")
    found = {name: place.match(name) for name in weights}
    return {name: weights[name] for name, match in found.items() if not match or int(match[2]) < kept[match[1]]}


def init_codebooks(model: DinoSR, loader: SpeechLoader, env: Environment, seed: int) -> None:
    """Take the first codewords from the first batch of the main process."""
    batch = next(loader.epoch(0)).to(env.device)
    generator = torch.Generator().manual_seed(seed)
    model.init_codebooks(
        batch.waveforms, attention_mask=batch.attention_mask, lengths=batch.lengths, generator=generator
    )
    for buffer in model.codebooks.buffers():
        env.broadcast(buffer)


def reset_codebooks(model: DinoSR, loader: SpeechLoader, env: Environment, cfg: Config) -> None:
    """Take new codewords from data, then draw new heads and fit only these, by SGD.

    Codebooks move meanwhile, as in every forward pass in training mode.
    """
    init_codebooks(model, loader, env, cfg.run.random_seed)
    for module in model.heads.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    heads = list(model.heads.parameters())
    for parameter in heads:
        env.broadcast(parameter.data)
    dtype = getattr(torch, cfg.optimizer.dtype)
    for batch in islice(chain.from_iterable(map(loader.epoch, count())), HEADS_STEPS):
        on_device = batch.to(env.device)
        with torch.autocast(env.device.type, dtype, enabled=cfg.optimizer.mixed_precision):
            loss, _ = model(on_device.waveforms, **on_device.options)
        for parameter, gradient in zip(heads, torch.autograd.grad(loss.sum(), heads), strict=True):
            env.all_reduce(gradient)
            parameter.data.sub_(gradient, alpha=HEADS_LR / max(1, len(loss)) / env.world_size)


class FrozenOutputs:
    """Outputs of the frozen parts of a model, computed once for each batch: ``data.cache``.

    The extractor's output, in float16, and the labels of all frames, once neither the teacher nor the codebooks change.
    Each process keeps its own batches' in memory, so they never belong to another model or manifest, and a resumed run
    fills its memory again in one epoch.

    Raises:
        InputError: The extractor never stops learning, or there is too little memory.
    """

    def __init__(self, model: DinoSR, cfg: Config, loader: SpeechLoader, env: Environment) -> None:
        self._model, self._device, self._enabled = model, env.device, cfg.data.cache
        self._frames: dict[Hashable, Tensor] = {}
        self._labels: dict[Hashable, Tensor] = {}
        if not cfg.data.cache:
            return
        if model.freeze_step >= cfg.optimizer.max_steps:
            raise InputError("data.cache: the extractor never stops learning; set model.freeze_step = 0")
        shapes, samples = model.conv_shapes, loader.dataset.lengths
        frames = int(conv_length(shapes, samples.clip(max=cfg.data.max_sample_size)).clip(0).sum())
        size = 2 * frames * shapes[-1][0] * cfg.data.num_distinct
        check_memory(size, "data.cache")
        logger.info("data.cache: up to %.2g GB of memory, over all processes", size / 1e9)

    @property
    def has_frames(self) -> bool:
        """Whether the extractor's output is being kept."""
        return self._enabled and self._model.extractor_frozen

    def has_labels(self, step: int) -> bool:
        """Whether labels are being kept too, after ``step`` steps."""
        model = self._model
        return (
            self.has_frames
            and model.ema_scheduler(step + 1) >= 1
            and untouched(*model.codebooks)
            and all(cast("Codebook", codebook).codebook_decay >= 1 for codebook in model.codebooks)
        )

    @torch.no_grad()
    def __call__(self, batch: Batch, there: Batch, step: int) -> dict[str, Tensor]:
        """What to pass to the model's forward with a batch, here on the CPU and on the device, after ``step`` steps."""
        if not self.has_frames:
            return {}
        # What makes a batch: recordings, crops and the width to which they are padded; masks differ each time.
        parts = (batch.rows, batch.starts, batch.lengths)
        key = (batch.waveforms.shape[1], *(None if x is None else x.numpy().tobytes() for x in parts))
        model, device = self._model, self._device
        if key not in self._frames:
            found = model.extract(there.waveforms, there.lengths)
            self._frames[key] = self._store(found, torch.float16)
        kept = {"frames": self._frames[key].to(device, non_blocking=True).float()}
        if self.has_labels(step):
            if key not in self._labels:
                features, attention_mask = model.project(there.waveforms, there.attention_mask, there.lengths, **kept)
                self._labels[key] = self._store(model.labels(features, attention_mask), torch.int32)
            kept["labels"] = self._labels[key].to(device, non_blocking=True).long()
        return kept

    def _store(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(x.shape, dtype=dtype, pin_memory=self._device.type == "cuda").copy_(x)

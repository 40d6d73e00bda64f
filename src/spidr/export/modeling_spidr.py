"""SpidR and DinoSR encoders for ``transformers``. Copied into exported folders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from spidr.config import SpidRConfig, model_config
from spidr.export.configuration_spidr import SpidREncoderConfig
from spidr.models.codebook import StepStatistics
from spidr.models.dinosr import DinoSR
from spidr.models.spidr import SpidR
from spidr.tools.errors import InputError
from spidr.tools.waveforms import standardise


class SpidREncoder(PreTrainedModel):
    """A SpidR or DinoSR encoder; ``model`` is the spidr model itself."""

    config_class = SpidREncoderConfig
    base_model_prefix = "model"
    main_input_name = "input_values"

    def __init__(self, config: SpidREncoderConfig) -> None:
        super().__init__(config)
        cfg = model_config(config.spidr_type, config.settings)
        self.model: DinoSR = SpidR(cfg) if isinstance(cfg, SpidRConfig) else DinoSR(cfg)
        self.model.drop_teacher()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise only what training needs, since the file has all weights."""
        if isinstance(module, StepStatistics):
            module.flat.zero_()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        *,
        normalize: bool = True,
        return_dict: bool = True,
        **_: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Encode a batch.

        Args:
            input_values: (B, S) float, 16 kHz, shorter rows padded at the end.
            attention_mask: (B, S), 1 for the samples that count, then 0.
            normalize: Standardise each utterance over its own samples, as in training.
            return_dict: Return a ``BaseModelOutput`` instead of a tuple.

        Returns:
            ``last_hidden_state`` (B, T, D) and ``hidden_states``: the projected features, then the layers from 1 on,
            each before the residual addition. ``hidden_states[6]`` is what ``encode(layer=6)`` gives.

        Raises:
            InputError: The mask is of another shape, or rows are padded at the beginning.
        """
        batch, samples = input_values.shape
        lengths = torch.full((batch,), samples)
        if attention_mask is not None:
            exists = attention_mask.bool()
            if exists.shape != input_values.shape or (exists[:, 1:] > exists[:, :-1]).any():
                raise InputError("attention_mask must be (B, S): 1 for a row's samples, then 0 for its padding")
            lengths = exists.sum(1)
        if normalize:
            input_values = standardise(input_values, lengths.to(input_values.device))
        features, mask = self.model.project(input_values, lengths=lengths)
        layers = self.model.student.get_intermediate_outputs(features, mask)
        output = BaseModelOutput(last_hidden_state=layers[-1], hidden_states=(features, *layers))
        return output if return_dict else output.to_tuple()

    def encode(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """``encode(waveforms, lengths, layer=6)``: features (B, T, D) of a layer, and the frames of each row."""
        return self.model.encode(*args, **kwargs)

    def units(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """``units(waveforms, lengths, layer=6)``: units (B, T), -1 in the padding, and the frames of each row."""
        return self.model.units(*args, **kwargs)

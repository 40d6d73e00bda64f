"""Utterances of several lengths, alone and as a batch."""

import torch
from torch import Tensor

from spidr.models import DinoSR
from spidr.tools.frames import conv_length

LENGTHS = [3000, 1700, 60, 2500]


def utterances() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, generator=generator) for length in LENGTHS]


def padded() -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(utterances(), batch_first=True)


def num_frames(model: DinoSR, length: int) -> int:
    return conv_length(model.cfg.extractor_conv_layer_config, length)

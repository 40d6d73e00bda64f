"""The models: tensors in, tensors out. Needs torch and numpy only; imports ``spidr.config`` and nothing else."""

from spidr.config import num_frames
from spidr.models.dinosr import DinoSR
from spidr.models.hub import build_model, dinosr_base_original, dinosr_base_reproduced, spidr_base
from spidr.models.spidr import SpidR

__all__ = [
    "DinoSR",
    "SpidR",
    "build_model",
    "dinosr_base_original",
    "dinosr_base_reproduced",
    "num_frames",
    "spidr_base",
]

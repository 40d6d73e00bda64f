"""The models: tensors in, tensors out. Needs torch and numpy only; imports ``spidr.config`` and nothing else."""

from spidr.models.dinosr import DinoSR
from spidr.models.spidr import SpidR

__all__ = ["DinoSR", "SpidR"]

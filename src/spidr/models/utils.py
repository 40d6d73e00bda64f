"""Where published packages have these names."""

from pathlib import Path

from spidr.models.dinosr import DinoSR
from spidr.models.hub import build_model, dinosr_base_original, dinosr_base_reproduced, spidr_base
from spidr.models.spidr import SpidR

__all__ = ["build_model", "dinosr_base_original", "dinosr_base_reproduced", "model_from_raw_checkpoint", "spidr_base"]


def model_from_raw_checkpoint(model_class: type[DinoSR], config_class: type, ckpt: str | Path) -> DinoSR:  # noqa: ARG001
    """Build the model of a checkpoint; see :func:`spidr.models.build_model`."""
    return build_model(model_type="spidr" if issubclass(model_class, SpidR) else "dinosr", checkpoint=ckpt)

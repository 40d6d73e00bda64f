"""The models: tensors in, tensors out. Needs torch and numpy only.

Names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from spidr.config import DEFAULT_CONV_LAYER_CONFIG
from spidr.tools.frames import conv_length
from spidr.tools.lazy import lazy_names

if TYPE_CHECKING:
    from spidr.models.dinosr import DinoSR
    from spidr.models.encoder import Encoder
    from spidr.models.hub import build_model, dinosr_base_original, dinosr_base_reproduced, spidr_base
    from spidr.models.spidr import SpidR
    from spidr.tools.waveforms import standardise
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "DinoSR": "dinosr",
            "Encoder": "encoder",
            "SpidR": "spidr",
            "build_model": "hub",
            "dinosr_base_original": "hub",
            "dinosr_base_reproduced": "hub",
            "spidr_base": "hub",
            "standardise": "encoder",
        },
    )


def num_frames(num_samples: int) -> int:
    """Number of frames that the base models make of ``num_samples`` samples; frame ``t`` begins at ``t * 20`` ms."""
    return conv_length(DEFAULT_CONV_LAYER_CONFIG, num_samples)


__all__ = [
    "DinoSR",
    "Encoder",
    "SpidR",
    "build_model",
    "dinosr_base_original",
    "dinosr_base_reproduced",
    "num_frames",
    "spidr_base",
    "standardise",
]

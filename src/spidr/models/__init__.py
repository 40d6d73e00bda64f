"""The models: tensors in, tensors out. Needs torch and numpy only.

Names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from spidr.config import DEFAULT_CONV_LAYER_CONFIG
from spidr.models.published import PUBLISHED
from spidr.tools.frames import conv_length
from spidr.tools.lazy import lazy_names

if TYPE_CHECKING:
    from spidr.models.dinosr import DinoSR
    from spidr.models.encoder import Encoder
    from spidr.models.hub import build_model, load_encoder
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
            "load_encoder": "hub",
            "standardise": "encoder",
            **dict.fromkeys(PUBLISHED, "hub"),
        },
    )


def num_frames(num_samples: int) -> int:
    """Number of frames that the base models make of ``num_samples`` samples; frame ``t`` begins at ``t * 20`` ms."""
    return conv_length(DEFAULT_CONV_LAYER_CONFIG, num_samples)


__all__ = ["DinoSR", "Encoder", "SpidR", "build_model", "load_encoder", "num_frames", "standardise", *PUBLISHED]

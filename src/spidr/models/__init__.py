"""The models: tensors in, tensors out. Needs torch and numpy only.

Names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from spidr.config import DEFAULT_CONV_LAYER_CONFIG
from spidr.models.published import PUBLISHED
from spidr.tools.frames import conv_length
from spidr.tools.lazy import lazy_names

if TYPE_CHECKING:
    from spidr.models.dinosr import DinoSR as DinoSR
    from spidr.models.encoder import Encoder as Encoder
    from spidr.models.hub import build_model as build_model, load_encoder as load_encoder
    from spidr.models.spidr import SpidR as SpidR
    from spidr.tools.waveforms import standardise as standardise
else:
    __getattr__, __all__ = lazy_names(
        __name__,
        here="num_frames",
        dinosr="DinoSR",
        encoder="Encoder standardise",
        hub=f"build_model load_encoder {' '.join(PUBLISHED)}",
        spidr="SpidR",
    )


def num_frames(num_samples: int) -> int:
    """Number of frames that the base models make of ``num_samples`` samples; frame ``t`` begins at ``t * 20`` ms."""
    return conv_length(DEFAULT_CONV_LAYER_CONFIG, num_samples)

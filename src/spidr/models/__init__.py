"""The models: tensors in, tensors out. Needs torch and numpy only.

Names are imported when they are first used. Imports ``spidr.config`` and ``spidr.lazy`` and nothing else.
"""

from typing import TYPE_CHECKING

from spidr.config import num_frames
from spidr.lazy import lazy_names

if TYPE_CHECKING:
    from spidr.models.dinosr import DinoSR
    from spidr.models.hub import build_model, dinosr_base_original, dinosr_base_reproduced, spidr_base
    from spidr.models.spidr import SpidR
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "DinoSR": "dinosr",
            "SpidR": "spidr",
            "build_model": "hub",
            "dinosr_base_original": "hub",
            "dinosr_base_reproduced": "hub",
            "spidr_base": "hub",
        },
    )

__all__ = [
    "DinoSR",
    "SpidR",
    "build_model",
    "dinosr_base_original",
    "dinosr_base_reproduced",
    "num_frames",
    "spidr_base",
]

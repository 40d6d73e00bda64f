"""Entry points of ``torch.hub.load("<this repository>", "spidr_base")``; needs no installation."""

import sys
from pathlib import Path

dependencies = ["torch", "numpy"]

_src = str(Path(__file__).parent / "src")
sys.path.insert(0, _src)
try:
    from spidr.models.hub import dinosr_base_original, dinosr_base_reproduced, spidr_base
finally:
    sys.path.remove(_src)

__all__ = ["dinosr_base_original", "dinosr_base_reproduced", "spidr_base"]

"""Entry points of ``torch.hub.load("<this repository>", "spidr_base")``; needs no installation."""

import sys
from pathlib import Path

dependencies = ["torch", "numpy"]

_src = str(Path(__file__).parent / "src")
sys.path.insert(0, _src)
try:
    from spidr.models import hub
    from spidr.models.published import PUBLISHED
finally:
    sys.path.remove(_src)

globals().update({name: getattr(hub, name) for name in PUBLISHED})
dinor_base_reproduced = hub.dinosr_base_reproduced  # the published page's spelling

__all__ = ["dinor_base_reproduced", *PUBLISHED]

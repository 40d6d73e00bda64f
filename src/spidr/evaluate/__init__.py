"""How good units, features and models are: ``python -m spidr.evaluate units|abx|model|robustness``.

Names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from spidr.tools.lazy import lazy_names

if TYPE_CHECKING:
    from spidr.evaluate.__main__ import main
    from spidr.evaluate.abx import FeatureFolder, Scorer, evaluate_abx, read_items
    from spidr.evaluate.model import evaluate_model
    from spidr.evaluate.robustness import evaluate_robustness
    from spidr.evaluate.units import evaluate_units
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "FeatureFolder": "abx",
            "Scorer": "abx",
            "evaluate_abx": "abx",
            "evaluate_model": "model",
            "evaluate_robustness": "robustness",
            "evaluate_units": "units",
            "main": "__main__",
            "read_items": "abx",
        },
    )

__all__ = [
    "FeatureFolder",
    "Scorer",
    "evaluate_abx",
    "evaluate_model",
    "evaluate_robustness",
    "evaluate_units",
    "main",
    "read_items",
]

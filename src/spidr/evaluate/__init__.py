"""Evaluate units, features and models: ``python -m spidr.evaluate units|abx|model|robustness``.

Names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from spidr.tools.lazy import lazy_names

if TYPE_CHECKING:
    from spidr.evaluate.__main__ import main as main
    from spidr.evaluate.abx import (
        FeatureFolder as FeatureFolder,
        Scorer as Scorer,
        evaluate_abx as evaluate_abx,
        read_items as read_items,
    )
    from spidr.evaluate.model import evaluate_model as evaluate_model
    from spidr.evaluate.robustness import evaluate_robustness as evaluate_robustness
    from spidr.evaluate.units import evaluate_units as evaluate_units
else:
    __getattr__, __all__ = lazy_names(
        __name__,
        __main__="main",
        abx="FeatureFolder Scorer evaluate_abx read_items",
        model="evaluate_model",
        robustness="evaluate_robustness",
        units="evaluate_units",
    )

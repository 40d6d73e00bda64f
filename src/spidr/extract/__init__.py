"""Features and units of a corpus: ``python -m spidr.extract features|units|kmeans``.

May import ``spidr.config``, ``spidr.data``, ``spidr.models``, ``spidr.environment`` and ``spidr.tools``.
"""

from spidr.extract.encoder import Options, Skipped
from spidr.extract.features import extract_features
from spidr.extract.kmeans import fit_kmeans
from spidr.extract.units import extract_units

__all__ = ["Options", "Skipped", "extract_features", "extract_units", "fit_kmeans"]

"""Features and units of a corpus: ``python -m spidr.extract features|units|kmeans``.

Names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from spidr.tools.lazy import lazy_names

if TYPE_CHECKING:
    from spidr.extract.features import extract_features as extract_features
    from spidr.extract.kmeans import fit_kmeans as fit_kmeans
    from spidr.extract.options import Options as Options
    from spidr.extract.session import Skipped as Skipped
    from spidr.extract.units import extract_units as extract_units
else:
    __getattr__, __all__ = lazy_names(
        __name__,
        features="extract_features",
        kmeans="fit_kmeans",
        options="Options",
        session="Skipped",
        units="extract_units",
    )

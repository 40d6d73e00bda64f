"""Features and units of a corpus: ``python -m spidr.extract features|units|kmeans``.

Names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from spidr.tools.lazy import lazy_names

if TYPE_CHECKING:
    from spidr.extract.features import extract_features
    from spidr.extract.kmeans import fit_kmeans
    from spidr.extract.options import Options
    from spidr.extract.session import Skipped
    from spidr.extract.units import extract_units
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "Options": "options",
            "Skipped": "session",
            "extract_features": "features",
            "extract_units": "units",
            "fit_kmeans": "kmeans",
        },
    )

__all__ = ["Options", "Skipped", "extract_features", "extract_units", "fit_kmeans"]

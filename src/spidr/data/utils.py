"""Names that published packages have here."""

from spidr.data.audio import num_samples
from spidr.data.manifest import read_manifest

__all__ = ["num_samples", "read_manifest"]

"""Utilities for the rest of the package, which know no settings."""

from spidr.tools.lazy import names_from

__getattr__ = names_from(__name__, "spidr.compat.tools")  # names that the published package has here

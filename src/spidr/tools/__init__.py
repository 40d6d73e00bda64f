"""The ground floor: what the rest of the package stands on. Knows no setting."""

from spidr.tools.lazy import names_from

__getattr__ = names_from(__name__, "spidr.compat.tools")  # what published packages also have here

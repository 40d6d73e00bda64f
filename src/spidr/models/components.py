"""Where published packages have the blocks; see :mod:`spidr.compat.components`."""

from spidr.compat.components import *  # noqa: F403
from spidr.compat.components import __all__  # noqa: F401

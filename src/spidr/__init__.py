"""SpidR and DinoSR: discrete linguistic units from raw speech, learned without labels."""

from spidr.tools.lazy import lazy_names
from spidr.tools.threads import runs_a_command, set_up_threads

__version__ = "0.3.0"
__getattr__, __all__ = lazy_names(
    __name__, here="__version__ config data evaluate export extract models report slurm train"
)

if runs_a_command():  # before torch is loaded; programs that import this package are not affected
    set_up_threads()

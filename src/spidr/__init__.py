"""SpidR and DinoSR: discrete linguistic units from raw speech, learned without labels."""

from spidr.tools.threads import runs_a_command, set_up_threads

__version__ = "0.3.0"

if runs_a_command():  # before torch is loaded; a program that imports this package is left as it is
    set_up_threads()

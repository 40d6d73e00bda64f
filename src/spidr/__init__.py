"""SpidR and DinoSR: discrete linguistic units from raw speech, learned without labels. Imports nothing."""

__version__ = "0.2.0"

"""SpidR and DinoSR: discrete linguistic units from raw speech, learned without labels."""

__version__ = "0.3.0"

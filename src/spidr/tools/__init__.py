"""The ground floor: what the rest of the package stands on. Knows no setting."""

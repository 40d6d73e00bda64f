"""The old name of :mod:`spidr.evaluate.abx`."""

from spidr.evaluate.abx import ABX, Items, Scorer, read_items

__all__ = ["ABX", "Items", "Scorer", "read_items"]

"""Random generators that are functions of what they are for. Imports nothing else of the package."""

from enum import IntEnum

import numpy as np


class Draw(IntEnum):
    """What random numbers are drawn for. Each purpose has streams of its own."""

    ORDER = 0
    BATCH = 1
    ROW = 2


def generator(seed: int, purpose: Draw, *key: int) -> np.random.Generator:
    """A generator that depends on its arguments only; different arguments give independent streams."""
    return np.random.default_rng((seed, purpose, *key))

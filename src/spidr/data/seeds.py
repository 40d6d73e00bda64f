"""Random generators that depend only on what they are for."""

from enum import IntEnum

import numpy as np


class Draw(IntEnum):
    """The purpose of random numbers. Each has its own streams."""

    ORDER = 0
    BATCH = 1
    ROW = 2


def generator(seed: int, purpose: Draw, *key: int) -> np.random.Generator:
    """A generator that depends on its arguments only; different arguments give independent streams."""
    return np.random.default_rng((seed, purpose, *key))

"""The best sequence of units when every change of unit has a price.

Source: Kamper and van Niekerk. Towards unsupervised phone and word segmentation using self-supervised
vector-quantized neural networks. Interspeech 2021 (duration-penalised dynamic programming).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NEAR = 3e-5
"""Two scores are near each other if they differ by less than this share of (1 + the range of the frame's scores). More
than ten times the largest change of a score by batching that was seen in float32."""


class Decoder:
    """Scores of frames, piece by piece, to the units of the highest total, less the price of the changes.

    Args:
        penalty: What each change of unit costs, λ; at 0 every frame gets the unit of its highest score.

    Attributes:
        nearly_tied: Whether other rounding of the scores could have led to other units.
    """

    def __init__(self, penalty: float = 0.0) -> None:
        self.penalty = penalty
        self.nearly_tied = False
        self._best: NDArray[np.float64] | None = None  # score of the best sequence that ends in each unit, highest 0
        self._leaders: list[NDArray[np.int32]] = []  # the unit of the best sequence up to each frame
        self._stays: list[NDArray[np.uint8]] = []  # packed: whether the best sequence to a unit was there before
        self._ties: list[NDArray[np.uint8]] = []

    def add(self, scores: NDArray[np.float32]) -> None:
        """Take the scores of the next frames, (T, V).

        They are log-probabilities or negative squared distances, up to a constant of each frame.
        """
        if len(scores) == 0:
            return
        tolerance = NEAR * (1 + scores.max(axis=1) - scores.min(axis=1))
        stays = np.empty(scores.shape, dtype=bool)
        ties = np.empty(scores.shape, dtype=bool)
        leaders = np.empty(len(scores), dtype=np.int32)
        tie_of_leaders = np.empty(len(scores), dtype=bool)
        best = self._best if self._best is not None else np.zeros(scores.shape[1])
        for t, frame in enumerate(scores):
            stays[t] = best >= -self.penalty
            ties[t] = np.abs(best + self.penalty) < tolerance[t]
            best = np.maximum(best, -self.penalty) + frame
            leaders[t] = leader = best.argmax()
            best -= best[leader]
            tie_of_leaders[t] = np.count_nonzero(best > -tolerance[t]) > 1
        self._best = best
        self._leaders.append(leaders)
        self._stays.append(np.packbits(stays, axis=1))
        self._ties.append(np.packbits(ties | tie_of_leaders[:, None], axis=1))

    def units(self) -> NDArray[np.int32]:
        """The units of all frames, (T,)."""
        units = np.concatenate(self._leaders) if self._leaders else np.empty(0, dtype=np.int32)
        if len(units) == 0:
            return units
        stays, ties, leaders = np.concatenate(self._stays), np.concatenate(self._ties), units.copy()
        unit = leaders[-1]
        for t in range(len(units) - 1, -1, -1):
            units[t] = unit
            byte, bit = divmod(int(unit), 8)
            self.nearly_tied |= bool(ties[t, byte] << bit & 128)
            if t and not stays[t, byte] << bit & 128:
                unit = leaders[t - 1]
        return units

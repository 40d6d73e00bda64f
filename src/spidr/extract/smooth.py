"""The best sequence of units with a cost for every change of unit.

Source: Kamper and van Niekerk. Towards unsupervised phone and word segmentation using self-supervised
vector-quantized neural networks. Interspeech 2021 (duration-penalised dynamic programming).
"""

import numpy as np
from numpy.typing import NDArray

NEAR = 3e-5
"""Two scores are nearly tied if they differ by less than this share of (1 + the range of the frame's scores). That is
more than ten times the largest change of a score by batching seen in float32."""


class Decoder:
    """Turn scores of frames, given piece by piece, into the units with the highest total after the cost of changes.

    Args:
        penalty: Cost of each change of unit, λ; at 0, every frame gets the unit with its highest score.

    Attributes:
        nearly_tied: Whether different rounding of the scores could have given other units; known after :meth:`units`.
    """

    def __init__(self, penalty: float = 0.0) -> None:
        self.penalty = penalty
        self.nearly_tied = False
        self._best: NDArray[np.float64] | None = None  # the best total up to each unit, the highest of them 0
        # Of each piece: the unit of the highest total at each frame and whether another is near it; and of each frame
        # and unit, packed, whether the best sequence to it was there the frame before and whether that was close.
        self._pieces: list[tuple[NDArray[np.int32], NDArray[np.bool], NDArray[np.uint8], NDArray[np.uint8]]] = []

    def add(self, scores: NDArray[np.float32]) -> None:
        """Take the scores of the next frames, (T, V): log-probabilities or similar, up to a constant per frame."""
        if len(scores) == 0:
            return
        tolerance = NEAR * (1 + scores.max(axis=1) - scores.min(axis=1))
        stays, close = np.empty(scores.shape, dtype=bool), np.empty(scores.shape, dtype=bool)
        leaders, tied = np.empty(len(scores), dtype=np.int32), np.empty(len(scores), dtype=bool)
        best = np.zeros(scores.shape[1]) if self._best is None else self._best
        for t, frame in enumerate(scores):
            stays[t] = best >= -self.penalty
            close[t] = np.abs(best + self.penalty) < tolerance[t]
            best = np.maximum(best, -self.penalty) + frame
            leaders[t] = best.argmax()
            best -= best[leaders[t]]
            tied[t] = np.count_nonzero(best > -tolerance[t]) > 1
        self._best = best
        self._pieces.append((leaders, tied, np.packbits(stays, axis=1), np.packbits(close, axis=1)))

    def units(self) -> NDArray[np.int32]:
        """The units of all frames, (T,)."""
        if not self._pieces:
            return np.empty(0, dtype=np.int32)
        leaders, tied, stays, close = (np.concatenate(parts) for parts in zip(*self._pieces, strict=True))
        units = np.empty_like(leaders)
        stayed = False
        for t in range(len(units) - 1, -1, -1):
            if not stayed:
                unit = int(leaders[t])
                self.nearly_tied |= bool(tied[t])
            units[t] = unit
            byte, bit = unit // 8, 128 >> unit % 8
            stayed = bool(stays[t, byte] & bit)
            self.nearly_tied |= t > 0 and bool(close[t, byte] & bit)
        return units

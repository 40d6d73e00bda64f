"""The best sequence of units with a cost for each change."""

from itertools import pairwise, product

import numpy as np
import pytest

from spidr.extract.smooth import Decoder


def total(scores: np.ndarray, units: tuple[int, ...], penalty: float) -> float:
    changes = sum(a != b for a, b in pairwise(units))
    return float(scores[np.arange(len(units)), list(units)].sum() - penalty * changes)


def decode(scores: np.ndarray, penalty: float, pieces: int = 1) -> tuple[list[int], bool]:
    decoder = Decoder(penalty)
    for piece in np.array_split(scores, pieces):
        decoder.add(piece)
    return decoder.units().tolist(), decoder.nearly_tied


@pytest.mark.parametrize("seed", range(40))
def test_no_other_sequence_is_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames, num_units, penalty = int(rng.integers(1, 7)), int(rng.integers(2, 5)), float(rng.exponential())
    scores = rng.standard_normal((frames, num_units)).astype(np.float32)
    units, _ = decode(scores, penalty, pieces=1 + seed % 3)
    best = max(product(range(num_units), repeat=frames), key=lambda found: total(scores, found, penalty))
    assert total(scores, tuple(units), penalty) == pytest.approx(total(scores, best, penalty))


def test_no_cost_high_cost_and_in_between() -> None:
    scores = np.random.default_rng(0).standard_normal((3000, 12)).astype(np.float32)
    changes = []
    for penalty in (1e-9, 0.5, 2.0, 1e6):
        units, _ = decode(scores, penalty, pieces=7)
        assert units == decode(scores, penalty)[0]
        assert units == decode(scores + np.linspace(-5, 5, 3000, dtype=np.float32)[:, None], penalty)[0]
        changes.append(sum(a != b for a, b in pairwise(units)))
    assert changes == sorted(changes, reverse=True)
    assert decode(scores, 1e-9)[0] == scores.argmax(1).tolist()
    assert set(decode(scores, 1e6)[0]) == {scores.sum(0).argmax()}


def test_near_ties_are_noticed_where_they_matter() -> None:
    scores = np.array([[3, 0, -9], [0, 3, -9], [0, 3, -9]], dtype=np.float32)
    assert decode(scores, 1.0) == ([0, 1, 1], False)
    assert decode(scores, 6.0) == ([1, 1, 1], False) or decode(scores, 6.0)[1]
    scores[0] = [3, 3 - 1e-6, -9]
    assert decode(scores, 0.5)[1] is False  # the first unit is 1 either way
    assert decode(scores[:1], 0.5)[1] is True


def test_no_frames() -> None:
    assert decode(np.empty((0, 4), dtype=np.float32), 1.0) == ([], False)

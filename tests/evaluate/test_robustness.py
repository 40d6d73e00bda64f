"""Changes of the sound against their definitions, and the resulting table."""

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
import torch
from torch import Tensor

from helpers.small_models import AT_50_HZ, tiny_model
from helpers.tiny_run import write_recordings
from spidr.evaluate.robustness import (
    CHANGES,
    edit_distance,
    evaluate_robustness,
    gain,
    merged,
    noise,
    pitch,
    reverberation,
    tempo,
)
from spidr.tools.errors import InputError


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def tone(frequency: float, seconds: float = 2.0) -> Tensor:
    return torch.sin(2 * math.pi * frequency * torch.arange(int(seconds * 16_000)) / 16_000)


def loudest(waveform: Tensor) -> float:
    """The frequency of the highest peak, in Hz."""
    middle = waveform[2000:-2000]
    spectrum = torch.fft.rfft(middle * torch.hann_window(len(middle))).abs()
    return float(spectrum.argmax()) * 16_000 / len(middle)


def test_gain_and_noise() -> None:
    x = tone(300)
    assert torch.allclose(gain(x, -20), x / 10)
    added = noise(x, 10, seeded()) - x
    assert 10 * math.log10(x.square().mean() / added.square().mean()) == pytest.approx(10, abs=0.1)
    assert torch.equal(noise(x, 10, seeded()), noise(x, 10, seeded()))


def test_reverberation() -> None:
    impulse = torch.zeros(16_000)
    impulse[0] = 1
    response = reverberation(impulse, 0.3, seeded())
    assert response[0] == pytest.approx(1, abs=1e-5)
    assert response[1:].norm() == pytest.approx(1, abs=1e-3)  # as much energy as the direct sound
    early, late = (response[start : start + 800].square().mean() for start in (1, 1 + int(0.15 * 16_000)))
    assert 10 * math.log10(early / late) == pytest.approx(30, abs=2)  # 60 dB in 0.3 s
    assert response[4800:].abs().max() < 1e-5


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_tempo(factor: float) -> None:
    """Tempo changes the length, not the pitch."""
    x = tone(440)
    changed = tempo(x, factor)
    assert len(changed) == round(len(x) / factor)
    assert loudest(changed) == pytest.approx(440, abs=2)
    assert changed[2000:-2000].square().mean() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("semitones", [-2, 2])
def test_pitch(semitones: float) -> None:
    """Pitch changes, the length does not."""
    x = tone(440)
    changed = pitch(x, semitones)
    assert len(changed) == len(x)
    assert loudest(changed) == pytest.approx(440 * 2 ** (semitones / 12), abs=3)
    assert changed[2000:-2000].square().mean() == pytest.approx(0.5, rel=0.05)


def slow_distance(a: list[int], b: list[int]) -> int:
    table = {(i, j): i + j for i in range(len(a) + 1) for j in range(len(b) + 1) if not i or not j}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            ways = table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            table[i, j] = min(ways)
    return table[len(a), len(b)]


def test_edit_distance() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = (rng.integers(0, 4, rng.integers(0, 12)).tolist() for _ in range(2))
        assert edit_distance(a, b) == slow_distance(a, b)
    assert merged([3, 3, 1, 1, 1, 3]).tolist() == [3, 1, 3]
    assert merged([]).tolist() == []


def test_table(tmp_path: Path) -> None:
    manifest = write_recordings(tmp_path, count=3)
    model = tiny_model(**AT_50_HZ)
    rows = evaluate_robustness(model, manifest, device="cpu")
    assert [row["layer"] for row in rows] == [2, 3, 4]
    assert all(set(row) == {"layer", *CHANGES} for row in rows)
    assert all(0 <= value <= 2 for row in rows for name, value in row.items() if name != "layer")
    assert model.training
    assert rows[1:2] == evaluate_robustness(model, manifest, layers=[3], device="cpu")
    with pytest.raises(InputError, match="layer 1 has no codebook; layers 2 to 4 have one"):
        evaluate_robustness(model, manifest, layers=[1])
    with pytest.raises(InputError, match="no recording is long enough, and as short as --max-minutes 0"):
        evaluate_robustness(model, manifest, max_minutes=0)


def test_manifests_without_lengths_and_recordings_of_a_single_frame(tmp_path: Path) -> None:
    manifest = pl.read_csv(write_recordings(tmp_path, count=3), infer_schema=False)
    soundfile.write(tmp_path / "short.wav", np.full(410, 0.1), 16_000)  # too short at another tempo
    short = pl.DataFrame({"fileid": ["short"], "path": [str(tmp_path / "short.wav")]})
    pl.concat([manifest.select("fileid", "path"), short]).write_csv(tmp_path / "paths.csv")
    model = tiny_model(**AT_50_HZ)
    expected = evaluate_robustness(model, tmp_path / "manifest.csv", device="cpu")
    assert evaluate_robustness(model, tmp_path / "paths.csv", device="cpu") == expected

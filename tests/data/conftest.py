"""Recordings on disk for the tests of the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from spidr.data.write_manifest import write_manifest


def noise(samples: int, seed: int = 0) -> np.ndarray:
    """Noise with a mean of its own, int16-valued."""
    rng = np.random.default_rng((seed, samples))
    values = rng.normal(2000 * rng.random(), 3000 * (0.1 + rng.random()), samples)
    return np.clip(values, -32768, 32767).astype(np.int16)


def write_audio(path: Path, samples: np.ndarray, sample_rate: int = 16_000, **options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, sample_rate, **options)
    return path


@pytest.fixture
def recordings(tmp_path: Path) -> Callable[..., Path]:
    """Write recordings of the given lengths and their manifest; returns the manifest's path."""

    def write(lengths: list[int], suffix: str = ".wav", **options: bool) -> Path:
        for i, length in enumerate(lengths):
            write_audio(tmp_path / "audio" / f"{i:05}{suffix}", noise(length, i))
        manifest = tmp_path / "manifest.csv"
        write_manifest(tmp_path / "audio", manifest, suffix, **options)
        return manifest

    return write

"""Recordings made for the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile


def noise(samples: int, seed: int = 0) -> np.ndarray:
    """Noise with a mean of its own, int16-valued."""
    rng = np.random.default_rng((seed, samples))
    values = rng.normal(2000 * rng.random(), 3000 * (0.1 + rng.random()), samples)
    return np.clip(values, -32768, 32767).astype(np.int16)


def write_audio(path: Path, samples: np.ndarray, sample_rate: int = 16_000, **options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, sample_rate, **options)
    return path

"""Recordings made for the tests."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import soundfile

from spidr.data.recording import Recording


def noise(samples: int, seed: int = 0) -> np.ndarray:
    """Noise with a random mean, as int16."""
    rng = np.random.default_rng((seed, samples))
    values = rng.normal(2000 * rng.random(), 3000 * (0.1 + rng.random()), samples)
    return np.clip(values, -32768, 32767).astype(np.int16)


def write_audio(path: Path, samples: np.ndarray, sample_rate: int = 16_000, **options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, sample_rate, **options)
    return path


def write_archive(path: Path, members: dict[str, bytes]) -> list[Recording]:
    """Write an archive. Returns the locations of its members."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with tarfile.open(path) as tar:
        return [Recording(member.name, str(path), member.offset_data, member.size) for member in tar]


def write_lines(path: Path, *rows: object) -> Path:
    """Write strings as they are and other rows as JSON."""
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path

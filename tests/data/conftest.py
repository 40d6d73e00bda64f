"""A manifest with its recordings, for tests of the data."""

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.synthetic import noise, write_audio
from spidr.data.write_manifest import write_manifest


@pytest.fixture
def recordings(tmp_path: Path) -> Callable[..., Path]:
    """Write recordings of the given lengths and their manifest. Returns the manifest's path."""

    def write(lengths: list[int], suffix: str = ".wav", **options: bool) -> Path:
        for i, length in enumerate(lengths):
            write_audio(tmp_path / "audio" / f"{i:05}{suffix}", noise(length, i))
        manifest = tmp_path / "manifest.csv"
        write_manifest(tmp_path / "audio", manifest, suffix, **options)
        return manifest

    return write

"""A manifest's recordings as waveforms."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from spidr.data.audio import read_audio, standardize, statistics_of
from spidr.data.manifest import PLACE, read_manifest, recordings_of
from spidr.data.measure import with_lengths
from spidr.data.recording import Recording
from spidr.tools.frames import conv_length
from spidr.tools.lazy import names_from

__getattr__ = names_from(__name__, "spidr.compat.dataset")  # names of the published package

__all__ = ["SpeechDataset", "conv_length", "speech_dataset"]


class SpeechDataset(Dataset[Tensor]):
    """Whole recordings of a manifest, or of the table that :func:`spidr.data.read_manifest` returns.

    Attributes:
        manifest: That table.
        normalize: Whether each recording is standardised over its whole length (population variance, 1e-5 added to
            it).
    """

    def __init__(self, manifest_path: str | Path | Sequence[str | Path] | pl.DataFrame, *, normalize: bool) -> None:
        given = manifest_path
        self.manifest = given if isinstance(given, pl.DataFrame) else read_manifest(given, needs_audio=True)
        self.normalize = normalize

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Samples of each row, read from the recordings if the manifest has no ``num_samples``."""
        return with_lengths(self.manifest, "MANIFEST")["num_samples"].to_numpy()

    def __len__(self) -> int:
        return self.manifest.height

    def __getitem__(self, row: int) -> Tensor:
        """Samples of a row as float32 (S,).

        Raises:
            InputError: The recording cannot be read (see :func:`spidr.data.audio.read_audio`).
        """
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of a manifest of {len(self)} rows")
        # One value at a time, since polars' threads would hang in a forked worker.
        place = {name: self.manifest[name][row % len(self)] for name in PLACE if name in self.manifest.columns}
        samples = read_audio(Recording(**place))
        if self.normalize:
            standardize(samples, *statistics_of(samples), out=samples)
        return torch.from_numpy(samples)

    def recordings(self, rows: NDArray[np.integer[Any]]) -> list[Recording]:
        """The recordings of some rows."""
        return recordings_of(self.manifest, rows)


def speech_dataset(path: str | Path | Sequence[str | Path], *, normalize: bool) -> SpeechDataset:
    """Open a manifest's recordings: ``[i]`` is row i's waveform, float32 (S,) at 16 kHz.

    Args:
        path: A manifest, or several (see :func:`spidr.data.read_manifest`).
        normalize: Standardise each recording over its whole length, as the published models expect.
    """
    return SpeechDataset(path, normalize=normalize)

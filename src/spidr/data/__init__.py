"""Manifests, audio, batches and masks: everything between recordings on disk and the tensors a model is trained on.

May import ``spidr.config``.
"""

from spidr.data.audio import num_samples
from spidr.data.batch import Batch
from spidr.data.dataset import speech_dataset
from spidr.data.loader import build_dataloader, build_validation_dataloader
from spidr.data.manifest import read_manifest

__all__ = [
    "Batch",
    "build_dataloader",
    "build_validation_dataloader",
    "num_samples",
    "read_manifest",
    "speech_dataset",
]

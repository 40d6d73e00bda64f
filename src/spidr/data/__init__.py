"""Manifests, audio, batches and masks: everything between recordings on disk and the tensors a model is trained on.

Names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from spidr.tools.lazy import lazy_names

if TYPE_CHECKING:
    from spidr.data.audio import num_samples
    from spidr.data.batch import Batch
    from spidr.data.dataset import speech_dataset
    from spidr.data.loader import build_dataloader, build_validation_dataloader
    from spidr.data.manifest import read_manifest
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "Batch": "batch",
            "build_dataloader": "loader",
            "build_validation_dataloader": "loader",
            "num_samples": "audio",
            "read_manifest": "manifest",
            "speech_dataset": "dataset",
        },
    )

__all__ = [
    "Batch",
    "build_dataloader",
    "build_validation_dataloader",
    "num_samples",
    "read_manifest",
    "speech_dataset",
]

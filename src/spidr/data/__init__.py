"""Manifests, audio, batches and masks: everything between recordings on disk and the tensors for training.

Names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from spidr.tools.lazy import lazy_names

if TYPE_CHECKING:
    from spidr.data.audio import num_samples as num_samples
    from spidr.data.batch import Batch as Batch
    from spidr.data.dataset import speech_dataset as speech_dataset
    from spidr.data.loader import (
        build_dataloader as build_dataloader,
        build_validation_dataloader as build_validation_dataloader,
    )
    from spidr.data.manifest import read_manifest as read_manifest
else:
    __getattr__, __all__ = lazy_names(
        __name__,
        audio="num_samples",
        batch="Batch",
        dataset="speech_dataset",
        loader="build_dataloader build_validation_dataloader",
        manifest="read_manifest",
    )

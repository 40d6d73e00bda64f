"""Check that everything a configuration names exists, before a job waits in the queue."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from spidr.adapt import first_weights
from spidr.config import Config, DataConfig
from spidr.data import speech_dataset
from spidr.data.alignments import read_alignments
from spidr.data.audio import num_samples
from spidr.models.hub import build_model, check_name
from spidr.models.published import PUBLISHED
from spidr.models.weights import fitting
from spidr.state import model_settings
from spidr.tools.download import is_remote
from spidr.tools.errors import InputError, ProblemsError, some


def check_inputs(configs: Iterable[Config]) -> None:
    """Check weights to begin with, manifests, alignments and recordings; raise all problems together.

    All recordings must exist; of some, the length is compared with the manifest's.
    """
    checks: list[Callable[[], object]] = []
    for cfg in configs:
        if cfg.run.init_ckpt is not None and not cfg.run.dir.exists():  # a run that has begun does not need it again
            checks.append(partial(_check_weights, cfg, cfg.run.init_ckpt))
        for data in (cfg.data, *cfg.validation.values()):
            checks.append(partial(_check_recordings, data))
            if data.alignments_path is not None:
                checks.append(partial(read_alignments, data.alignments_path))
    problems: dict[str, None] = {}
    for check in checks:
        try:
            check()
        except InputError as error:
            problems[str(error)] = None
    if problems:
        raise ProblemsError(("", problem) for problem in problems)


def _check_weights(cfg: Config, source: str) -> None:
    check_name(source)
    if source in PUBLISHED or is_remote(source):  # would have to be downloaded
        return
    cfg = replace(cfg, model=model_settings(cfg))
    with torch.device("meta"):
        model = build_model(cfg=cfg.model, model_type=cfg.run.model_type)
    fitting(model, first_weights(cfg), source)


def _check_recordings(data: DataConfig) -> None:
    dataset = speech_dataset(data.manifest, normalize=False)
    recordings = dataset.recordings(np.arange(len(dataset)))
    files = list(dict.fromkeys(recording.archive or recording.path for recording in recordings))
    with ThreadPoolExecutor(16) as pool:
        missing = [file for file, exists in zip(files, pool.map(os.path.exists, files), strict=True) if not exists]
    if missing and data.on_error == "raise":
        named = some(missing, 3)
        raise InputError(f"{data.manifest}: {len(missing):,} of {len(files):,} files do not exist: {named}")
    if "num_samples" in dataset.manifest.columns and data.on_error == "raise":
        for row in np.unique(np.linspace(0, len(recordings) - 1, 20).astype(int)).tolist():
            found, expected = num_samples(recordings[row]), dataset.manifest["num_samples"][row]
            if abs(found - expected) > 1:  # lengths by spidr 0.1.2 are rounded durations: one off at most
                raise InputError(
                    f"{data.manifest}: {recordings[row]} has {found:,} samples, not {expected:,}: write the manifest "
                    "again"
                )

"""Evaluate every layer and codebook of a model in one pass over the audio."""

import math
import tempfile
from collections.abc import Collection, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spidr.config import MAX_SAMPLES, SAMPLE_RATE
from spidr.data.alignments import SILENT_LABELS, read_alignments
from spidr.data.names import match_rows
from spidr.evaluate.abx import Items, Scorer
from spidr.models import DinoSR
from spidr.tools.errors import InputError, some
from spidr.tools.files import writing
from spidr.tools.lazy import needs_extra


class _Spool:
    """Features of a corpus, in one file per layer since they may not fit in memory."""

    def __init__(self, folder: Path, layers: Sequence[int]) -> None:
        self.layers = layers
        self._folder, self._frames = folder, 0
        self._spans: dict[str, slice] = {}

    def add(self, name: str, outputs: Sequence[torch.Tensor]) -> None:
        for layer, output in zip(self.layers, outputs, strict=True):
            path = self._folder / str(layer)
            with writing(path), path.open("ab") as file:
                file.write(output.float().contiguous().numpy().data)
        begin, self._frames = self._frames, self._frames + len(outputs[0])
        self._spans[name] = slice(begin, self._frames)

    def read(self, layer: int, dim: int) -> dict[str, NDArray[Any]]:
        if not self._spans:
            return {}
        whole = np.memmap(self._folder / str(layer), np.float32, "r", shape=(self._frames, dim))
        return {name: whole[span] for name, span in self._spans.items()}


def evaluate_model(
    model: DinoSR,
    manifest: str | Path,
    alignments: str | Path,
    *,
    items: Items | None = None,
    layers: Sequence[int] | None = None,
    device: str = "auto",
    max_batch_length: int = 3_800_000,
    tier: str | None = None,
    silence: Collection[str] = SILENT_LABELS,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate every layer and codebook of a model in one pass over the audio.

    Args:
        model: The model; it is moved to the device.
        manifest: The recordings; each is standardised and encoded whole.
        alignments: Phones of these recordings, or of some of them.
        items: Also compute ABX, of the layers' outputs (angular distance) and of the units. The outputs go into a
            temporary folder: 154 kB per layer and second of audio with the base model.
        layers: Layers to evaluate, counted from 1; None: all.
        device: As ``run.device``.
        max_batch_length: Samples in a batch, padding included.
        tier: The tier of TextGrids.
        silence: Labels that mean silence.
        progress: Show a progress bar.

    Returns:
        For each layer ``layer``; if it has a codebook, the fields of :class:`spidr.models.metrics.UnitsQuality`; with
        ``items`` ``abx_within`` and ``abx_across`` and, with a codebook, ``units_abx_within`` and ``units_abx_across``.

    Raises:
        InputError: A file cannot be read, nothing is aligned, or the model has no such layer.
    """
    with needs_extra("train"):
        from tqdm import tqdm

        from spidr.data import speech_dataset
        from spidr.environment import Environment
        from spidr.validate import codebooks_quality, encode_rows, phones_of_rows

    if not 1 <= max_batch_length <= MAX_SAMPLES:
        raise InputError(f"max_batch_length: found {max_batch_length}, expected 1 to {MAX_SAMPLES:,} samples")
    chosen = chosen_layers(model, layers)
    stride = math.prod(stride for _, _, stride in model.cfg.extractor_conv_layer_config)
    scorer = Scorer(items, frame_rate=Fraction(SAMPLE_RATE, stride)) if items is not None else None
    env = Environment.alone(device)
    dataset = speech_dataset(manifest, normalize=True)
    phones = phones_of_rows(dataset, read_alignments(alignments, tier, silence=silence))
    if not phones:
        raise InputError(f"{alignments}: aligns no recording of {manifest}")
    wanted = set() if items is None else set(items.files)
    spoken = match_rows(wanted, dataset.manifest["fileid"].to_list(), dataset.manifest["path"].to_list())
    if items is not None and (missing := sorted(wanted - set(spoken.values()))):
        raise InputError(f"{items.path}: {manifest} lacks {len(missing)} of its recordings, such as {some(missing, 3)}")
    rows = sorted(phones.keys() | spoken.keys())
    model, first = model.to(env.device), model.codebook_layers.start
    units: dict[int, torch.Tensor] = {}
    table = []
    with tempfile.TemporaryDirectory(prefix="spidr-abx-") as folder:
        spool = _Spool(Path(folder), chosen if items is not None else ())
        encoded = encode_rows(model, dataset, rows, max_batch_length, env, layers=spool.layers)
        for row, codebooks, outputs in tqdm(encoded, total=len(rows), unit="file", disable=not progress):
            units[row] = codebooks
            if row in spoken:
                spool.add(spoken[row], outputs)
        if not units:
            raise InputError(f"{manifest}: no recording is long enough for a frame")
        qualities = codebooks_quality(model, phones, {row: units[row] for row in phones if row in units})
        for layer in tqdm(chosen, unit="layer", disable=not progress or scorer is None):
            result: dict[str, Any] = {"layer": layer}
            if layer >= first:
                result |= qualities[layer - first]._asdict()
            if scorer is not None:
                score = scorer.score(spool.read(layer, model.cfg.encoder_embed_dim))
                result |= {"abx_within": score.within, "abx_across": score.across}
            if scorer is not None and layer >= first:
                of_layer = {name: units[row][layer - first].numpy() for row, name in spoken.items() if row in units}
                score = scorer.score(of_layer, "identical")
                result |= {"units_abx_within": score.within, "units_abx_across": score.across}
            table.append(result)
    return table


def chosen_layers(model: DinoSR, layers: Sequence[int] | None) -> list[int]:
    """Sort and check a choice of layers; None: all. Raises InputError if the model has no such layer."""
    total = len(model.student.layers)
    chosen = list(range(1, total + 1)) if layers is None else sorted(set(layers))
    if wrong := [layer for layer in chosen if not 1 <= layer <= total]:
        raise InputError(f"layer must be between 1 and {total}, not {wrong[0]}")
    return chosen

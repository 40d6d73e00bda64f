"""Validate a model on held-out recordings: loss, perplexities and, with phone alignments, unit quality.

Deterministic: float32, fixed batches, crops and masks seeded by the manifest's rows, and sums that do not depend on the
order of the batches, so the same checkpoint and data give the same numbers on any number of processes.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from spidr.config import SAMPLE_RATE, Config, DataConfig, MaskingConfig, ResumeConfig
from spidr.data import Batch, build_validation_dataloader, speech_dataset
from spidr.data.alignments import FRAME_STEP, Alignments, fit, read_alignments
from spidr.data.dataset import SpeechDataset
from spidr.data.names import match_rows
from spidr.environment import Environment, StopFlag, environment
from spidr.models import DinoSR
from spidr.models.hub import build_model, load_weights
from spidr.models.metrics import UnitsQuality, units_quality
from spidr.models.weights import load_into
from spidr.tools.errors import InputError
from spidr.tools.files import atomic_write
from spidr.tools.frames import conv_length

AnyBatch = Batch | tuple[Tensor, Tensor | None, Tensor | None]

Measured = tuple[float, dict[str, list[float]]]  # masked frames of a batch, and its values


def validate(model: nn.Module, loader: Iterable[AnyBatch], device: torch.device | str) -> dict[str, float]:
    """Validate on the batches of a loader, in float32.

    Args:
        model: On ``device``, as it is or wrapped for several processes; its mode is restored.
        loader: See :func:`spidr.data.build_validation_dataloader`; or any batches (waveforms, attention_mask, mask).
        device: The device to compute on.

    Returns:
        ``loss`` per masked frame, and ``target_ppl`` and ``pred_ppl``: the batches' perplexities, weighted by their
        masked frames.

    Raises:
        InputError: There is no batch.
    """
    means = _weighted_means(_measure(cast("DinoSR", getattr(model, "module", model)), loader, device))
    return {name: means[name][0] for name in ("loss", "target_ppl", "pred_ppl")}


@contextmanager
def _inference(model: DinoSR, device: torch.device | str) -> Iterator[None]:
    """Eval mode, no gradient, no autocast, and no reduction over processes, as each has its own batches."""
    training, reduction = model.training, model.reduction
    model.eval()
    model.reduction = lambda _: None
    try:
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        model.train(training)
        model.reduction = reduction


def _measure(
    model: DinoSR, loader: Iterable[AnyBatch], device: torch.device | str, stop: StopFlag | None = None
) -> list[Measured]:
    measured = []
    with _inference(model, device):
        for batch in loader:
            if stop is not None and stop.signum:
                break
            if isinstance(batch, Batch):
                there = batch.to(device, non_blocking=True)
                loss, outputs = model(there.waveforms, **there.options)
            else:
                waveforms, attention_mask, mask = (None if x is None else x.to(device) for x in batch)
                loss, outputs = model(waveforms, attention_mask=attention_mask, mask=mask)
            if not loss.numel():  # very short recordings without a masked frame
                continue
            # On the CPU, since MPS has no float64.
            values = {name: value.cpu().double().reshape(-1).tolist() for name, value in outputs.items()}
            measured.append((float(loss.numel()), values | {"loss": [loss.cpu().double().mean().item()]}))
    return measured


def _weighted_means(measured: list[Measured]) -> dict[str, list[float]]:
    """Means weighted by frames. ``fsum`` rounds once, so the order does not matter."""
    if not measured:
        raise InputError("there is no batch to validate on")
    total = math.fsum(weight for weight, _ in measured)
    return {
        name: [math.fsum(weight * values[name][k] for weight, values in measured) / total for k in range(len(first))]
        for name, first in measured[0][1].items()
    }


def layer_names(model: DinoSR) -> list[str]:
    """Suffixes ``l1``, ``l2``, … of the layers that have a codebook, for the names of metrics."""
    return [f"l{layer}" for layer in model.codebook_layers]


def validate_set(
    model: DinoSR, data: DataConfig, masking: MaskingConfig, env: Environment, stop: StopFlag | None = None
) -> dict[str, float]:
    """Validate on one ``[validation.NAME]`` set, shared among all processes, whose device the model is on.

    Returns:
        The values of :func:`validate`, ``target_ppl_lN`` and ``pred_ppl_lN`` for each layer N that has a codebook and,
        with ``alignments_path``, ``pnmi_lN``, ``phone_purity_lN``, ``cluster_purity_lN``, ``unit_ppl_lN``,
        ``active_codewords_lN`` and ``bitrate_lN`` of the units. The same on every process.

    Raises:
        Preempted: On every process, if ``stop`` was set on any.
    """
    shapes, channels, names = model.cfg.extractor_conv_layer_config, model.cfg.encoder_embed_dim, layer_names(model)
    loader = build_validation_dataloader(
        data, masking, conv_layer_config=shapes, channels=channels, rank=env.rank, world_size=env.world_size
    )
    with closing(loader):
        measured = _measure(model, loader, env.device, stop)
    means = _weighted_means(list(chain.from_iterable(env.gather_objects(measured, stop))))
    metrics = {name: means[name][0] for name in ("loss", "target_ppl", "pred_ppl")}
    for name in ("target_ppl", "pred_ppl"):
        metrics |= {f"{name}_{layer}": value for layer, value in zip(names, means[f"{name}s"], strict=True)}
    if data.alignments_path is not None:
        metrics |= _units_metrics(model, data, data.alignments_path, env, stop)
    return metrics


def _units_metrics(
    model: DinoSR, data: DataConfig, alignments_path: str, env: Environment, stop: StopFlag | None
) -> dict[str, float]:
    dataset = speech_dataset(data.manifest, normalize=data.normalize)
    phones = phones_of_rows(dataset, read_alignments(alignments_path))
    if not phones:
        raise InputError(
            f"{alignments_path}: aligns no recording of {data.manifest}; the fileid or the file's stem must be the "
            "same in both"
        )
    encoded = encode_rows(model, dataset, sorted(phones), data.max_batch_length, env, stop)
    parts = env.gather_objects({row: units for row, units, _ in encoded}, stop)
    units = {row: codebooks for part in parts for row, codebooks in part.items()}
    metrics: dict[str, float] = {}
    for layer, quality in zip(layer_names(model), codebooks_quality(model, phones, units), strict=True):
        values = quality._asdict()
        values["unit_ppl"] = values.pop("codebook_perplexity")  # not to be confused with the targets' perplexity
        metrics |= {f"{name}_{layer}": float(value) for name, value in values.items()}
    return metrics


def frame_step(model: DinoSR) -> int:
    """Milliseconds per frame."""
    return 1000 * math.prod(stride for _, _, stride in model.cfg.extractor_conv_layer_config) // SAMPLE_RATE


def codebooks_quality(model: DinoSR, phones: dict[int, list[str]], units: dict[int, Tensor]) -> list[UnitsQuality]:
    """The quality of each codebook's units (K, T), by row, given the phones of these or more rows, one per 10 ms."""
    frames = {row: codebooks.shape[1] * frame_step(model) // FRAME_STEP for row, codebooks in units.items()}
    phones = {row: fit(phones[row], frames[row]) or phones[row] for row in units}
    num_phones = len({phone for labels in phones.values() for phone in labels})
    qualities = []
    for k in range(model.num_codebooks):
        aligned: Any = {f"row {row}": (phones[row], codebooks[k].numpy()) for row, codebooks in sorted(units.items())}
        sizes = {"num_units": model.cfg.codebook_size, "num_phones": num_phones}
        steps = {"frame_step": frame_step(model), "alignment_step": FRAME_STEP}
        qualities.append(units_quality(aligned, **sizes, **steps))
    return qualities


def phones_of_rows(dataset: SpeechDataset, alignments: Alignments) -> dict[int, list[str]]:
    """The phones of those rows of a manifest that are aligned, by their fileid or else their path."""
    matched = match_rows(alignments, dataset.manifest["fileid"].to_list(), dataset.manifest["path"].to_list())
    return {row: alignments[name] for row, name in matched.items()}


def encode_rows(
    model: DinoSR,
    dataset: SpeechDataset,
    rows: list[int],
    max_batch_length: int,
    env: Environment,
    stop: StopFlag | None = None,
    layers: Sequence[int] = (),
) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
    """Encode this process's share of some recordings, whole, in batches of similar length, the shortest first.

    Rows too short for a frame are skipped; a batch has up to ``max_batch_length`` samples, padding included. The
    outputs of ``layers``, counted from 1, take a second forward pass.

    Yields:
        Each row, its units (K, T) and the outputs of those layers, each (T, D), on the CPU.
    """
    shapes = model.cfg.extractor_conv_layer_config
    lengths = dataset.lengths
    rows = sorted((row for row in rows if conv_length(shapes, int(lengths[row])) > 0), key=lengths.__getitem__)
    with _inference(model, env.device):
        for batch in _pack(rows, lengths, max_batch_length)[env.rank :: env.world_size]:
            if stop is not None and stop.signum:
                break
            waveforms = [dataset[row] for row in batch]
            samples = torch.tensor([len(waveform) for waveform in waveforms])
            padded = pad_sequence(waveforms, batch_first=True).to(env.device)
            given = samples if len(samples.unique()) > 1 else None
            codebooks = [p for p in model.get_codebooks(padded, lengths=given) if p is not None]
            units = torch.stack([p.argmax(-1) for p in codebooks], dim=1).cpu()
            outputs: list[Tensor] = []
            if layers:
                all_outputs = model.get_intermediate_outputs(padded, lengths=given, num_layers=max(layers))
                outputs = [all_outputs[layer - 1].cpu() for layer in layers]
            for i, count in enumerate(conv_length(shapes, samples).tolist()):
                yield batch[i], units[i, :, :count], [output[i, :count] for output in outputs]


def _pack(rows: list[int], lengths: np.ndarray, limit: int) -> list[list[int]]:
    """Batches of consecutive rows, from short to long, as many as fit into ``limit`` with padding."""
    batches: list[list[int]] = []
    for row in rows:
        if batches and (len(batches[-1]) + 1) * lengths[row] <= limit:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def load_trained(cfg: Config, checkpoint: str | Path) -> DinoSR:
    """The model of a run's checkpoint, in eval mode and without what hooks may have added to it.

    Raises InputError if the checkpoint (see :func:`spidr.models.hub.load_weights`) does not fit the configuration.
    """
    model = build_model(cfg=cfg.model)
    known = model.state_dict().keys()
    load_into(model, {k: v for k, v in load_weights(checkpoint).items() if k in known}, checkpoint)
    return model.eval()


def validate_existing_checkpoint(cfg: Config, resume: ResumeConfig) -> None:
    """Validate a checkpoint of a run on all validation sets and write the results as JSON lines, or not at all."""
    with environment(cfg.run.device, use_deterministic=cfg.run.use_deterministic) as env:
        model = load_trained(cfg, resume.checkpoint).to(env.device)
        lines = [
            {"step": resume.step, "group": group, **validate_set(model, data, cfg.masking, env)}
            for group, data in cfg.validation.items()
        ]
        if env.is_main:
            with atomic_write(Path(resume.results)) as file:
                file.writelines(json.dumps(line).encode() + b"\n" for line in lines)

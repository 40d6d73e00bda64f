"""The contents of the page, gathered from a run folder, written as ``index.html`` and PNG figures."""

import json
import os
import re
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spidr.checkpoint import Checkpointer
from spidr.config import SAMPLE_RATE, Config, read_config, to_dict
from spidr.data import speech_dataset
from spidr.data.alignments import FRAME_STEP, read_alignments
from spidr.environment import Environment
from spidr.models.metrics import proba_phone_code
from spidr.models.weights import read_weights
from spidr.report import figures
from spidr.report.page import Page
from spidr.tools import healthy
from spidr.tools.errors import InputError, some
from spidr.tools.files import atomic_write, make_folder
from spidr.tools.metrics import Line, read_metrics
from spidr.validate import encode_rows, frame_step, load_trained, phones_of_rows

LARGEST = 1e100  # steps and values beyond this cannot be drawn

PER_STEP = {
    "Gradient norm": "grad_norm",
    "Learning rate": "lr",
    "EMA decay": "ema_decay",
    "Audio seconds per second": "audio_seconds_per_second",
    "Share of time waiting for data": "data_wait_share",
}
USE = {
    "Perplexity of the targets": "target_ppl",
    "Perplexity of the predictions": "pred_ppl",
    "Active codewords": "active_codewords",
}
QUALITY = {
    "PNMI": "pnmi",
    "Phone purity": "phone_purity",
    "Cluster purity": "cluster_purity",
    "Perplexity of the units": "unit_ppl",
    "Active codewords": "active_codewords",
    "Bits per second": "bitrate",
}
"""Titles of panels, and the metrics in them."""


def drawable(lines: Sequence[Line]) -> tuple[list[Line], list[str]]:
    """The lines without values that cannot be drawn, and the names of those values."""
    left_out: list[str] = []
    kept = []
    for line in lines:
        wrong = [key for key, value in line.items() if not isinstance(value, str | None) and not abs(value) < LARGEST]
        left_out += [f"{key} of {line['group']} at step {str(line['step'])[:20]}" for key in wrong]
        if "step" not in wrong:
            kept.append({key: value for key, value in line.items() if key not in wrong})
    return kept, left_out


def curve(lines: Sequence[Line], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, where it exists."""
    known = [line for line in lines if line.get(key) is not None]
    return [line["step"] for line in known], [line[key] for line in known]


def by_layer(lines: Sequence[Line], name: str) -> figures.Curves:
    """The curves of a metric, one per codebook."""
    found = (re.fullmatch(rf"{name}_l(\d{{1,4}})", key, re.ASCII) for line in lines for key in line)
    layers = sorted({int(match[1]) for match in found if match})
    return {f"layer {layer}": curve(lines, f"{name}_l{layer}") for layer in layers}


class Report:
    """Collects the page of a run and its figures."""

    def __init__(self, folder: Path, cfg: Config) -> None:
        self.folder, self.cfg = folder, cfg
        self.checkpoint = newest_checkpoint(folder)
        lines = sorted(read_metrics(folder / "metrics.jsonl"), key=lambda line: line["step"])
        self.lines, self.left_out = drawable(lines)
        self.page = Page(f"{cfg.run.wandb_project} / {cfg.run.wandb_name}")
        self.drawn: list[figures.Drawn] = []

    def add(self, drawn: figures.Drawn, description: str) -> None:
        """Add a figure to the page and keep it for its PNG."""
        self.drawn.append(drawn)
        self.page.figure(drawn, description)

    def group(self, name: str) -> list[Line]:
        """The lines of a group."""
        return [line for line in self.lines if line["group"] == name]

    # ------------------------------------------------------------------------------------------------- from metrics

    def summary(self) -> None:
        """Write what was trained and how far it is."""
        cfg, model = self.cfg, self.cfg.model
        step = max((line["step"] for line in self.lines), default=0)
        self.page.text(
            f"{'SpidR' if cfg.run.model_type == 'spidr' else 'DinoSR'}, {model.encoder_num_layers} layers of "
            f"{model.encoder_embed_dim}, {model.num_codebooks} codebooks of {model.codebook_size}. "
            f"Step {step:,} of {cfg.optimizer.max_steps:,}."
        )
        _, speeds = curve(self.group("train"), "audio_seconds_per_second")
        trained = f"Trained at {np.median(speeds):,.0f} seconds of audio a second (median). " if speeds else ""
        self.page.text(f"{trained}Folder: {self.folder}", note=True)
        if self.left_out:
            self.page.text(f"Left out, since it cannot be drawn: {some(self.left_out)}.", note=True)

    def training(self) -> None:
        """Draw losses, rates, throughput, and the use of the codebooks."""
        train = self.group("train")
        if not train:
            self.page.text("The run has logged nothing yet.", note=True)
            return
        losses = {"training": curve(train, "loss")}
        losses |= {name: curve(self.group(name), "loss") for name in self.cfg.validation if self.group(name)}
        rates = {title: {name: curve(train, name)} for title, name in PER_STEP.items()}
        panels = {"Loss": losses} | {title: lines for title, lines in rates.items() if lines[PER_STEP[title]][0]}
        self.page.heading(
            "Training",
            "The loss falls fast, then slowly, and validation follows; the gradient norm stays level. Little time "
            "should be spent waiting for data.",
        )
        self.add(
            figures.curves("training", panels, self._published(losses)),
            "Loss, gradient norm, learning rate, EMA decay and throughput by step",
        )
        self.page.heading(
            "Codebooks in training batches",
            "Perplexities rise in the first steps and then stay: one that falls towards 1 is of a collapsing codebook.",
        )
        use = {title: by_layer(train, name) for title, name in USE.items()}
        self.add(figures.curves("codebooks", use), "Perplexities and active codewords of each layer by step")

    def _published(self, losses: figures.Curves) -> dict[str, figures.Band]:
        """The losses of published runs of the base model; says on the page if this one is unlike them."""
        if self.cfg.run.init_ckpt is not None or not healthy.is_base(self.cfg.model):
            return {}
        for group in self.cfg.validation:
            steps, values = curve(self.group(group), "loss")
            active = [y[-1] for _, y in by_layer(self.group(group), "active_codewords").values() if y]
            if steps and (said := healthy.unlike_published(int(steps[-1]), values[-1], active)):
                self.page.text(f"{group}: {said}.")
        last = max((x[-1] for x, _ in losses.values() if x), default=0)
        known = [step for step in healthy.LOSS if step < last] + [last]
        low, high = zip(*map(healthy.expected_loss, known), strict=True)
        return {"Loss": (known, low, high)}

    def quality(self, group: str) -> None:
        """Draw unit quality over time, and write its last values."""
        lines = self.group(group)
        panels = {title: curves for title, name in QUALITY.items() if (curves := by_layer(lines, name))}
        if not panels:
            reason = "has no alignments_path or is yet to come"
            self.page.text(f"No unit quality: [validation.{group}] {reason}.", note=True)
            return
        self.page.heading(
            f"Units of {group}",
            "PNMI, the share of the phones' entropy that the units explain, and the purities against the alignments: "
            "higher is better. They are decided early and differ between layers.",
        )
        name = group if re.fullmatch(r"[\w.-]+", group) else list(self.cfg.validation).index(group)
        self.add(figures.curves(f"units-{name}", panels), f"Quality of the units of {group} by step")
        layers = next(iter(panels.values()))
        rows = [[layer, *(f"{curves[layer][1][-1]:.4g}" for curves in panels.values())] for layer in layers]
        self.page.text(f"At step {lines[-1]['step']:,}:")
        self.page.table(["", *panels], rows)

    # ------------------------------------------------------------------------------------------------- from the model

    def units(self, group: str, layer: int | None, max_minutes: float, device: str) -> None:
        """Draw P(phone | unit) and one utterance, of the newest checkpoint."""
        if self.checkpoint is None:
            self.page.text("No checkpoint, so no units to show.", note=True)
            return
        try:
            self._units(group, self.checkpoint, layer, max_minutes, device)
        except InputError as error:
            # The data may be gone from this machine; what the metrics tell is still worth a report.
            sys.stderr.write(f"warning: no units in the report: {error}\n")
            self.page.text(f"Units are not shown: {error}", note=True)

    def _units(self, group: str, checkpoint: Path, layer: int | None, max_minutes: float, device: str) -> None:
        env, data = Environment.alone(device), self.cfg.validation[group]
        model = load_trained(self.cfg, checkpoint).to(env.device)
        numbers = model.codebook_layers
        if layer is None:  # the one with the best PNMI at the end, else the last
            last = next((line for line in reversed(self.group(group)) if f"pnmi_l{numbers[0]}" in line), {})
            layer = max(numbers, key=lambda number: (last.get(f"pnmi_l{number}") or 0, number))
        if layer not in numbers:
            raise InputError(f"layer {layer} has no codebook; those of layers {numbers[0]} to {numbers[-1]} have one")
        dataset = speech_dataset(data.manifest, normalize=data.normalize)
        phones = phones_of_rows(dataset, read_alignments(data.alignments_path)) if data.alignments_path else {}
        rows = np.array(sorted(phones) or range(len(dataset)))
        rows = rows[np.cumsum(dataset.lengths[rows]) <= max_minutes * 60 * SAMPLE_RATE]
        if not len(rows):
            raise InputError(f"no recording of {data.manifest} fits into --max-minutes {max_minutes:g}")
        encoded = encode_rows(model, dataset, rows.tolist(), data.max_batch_length, env)
        units = {row: codebooks.numpy() for row, codebooks, _ in encoded}
        step, size = frame_step(model), model.cfg.codebook_size
        if phones:
            codebook = numbers.index(layer)
            matrix, names, order = proba_phone_code(
                {str(row): (phones[row], codebooks[codebook]) for row, codebooks in units.items()},
                num_units=size, num_phones=len({phone for row in units for phone in phones[row]}),
                only_active=True, frame_step=step, alignment_step=FRAME_STEP,
            )  # fmt: skip
            self.page.heading(
                f"Which phones the units of layer {layer} stand for",
                "A dark diagonal: each unit stands for one phone. Pale columns are units that stand for nothing.",
            )
            minutes = dataset.lengths[list(units)].sum() / SAMPLE_RATE / 60
            title = f"{len(order)} of {size} units active in {minutes:.1f} minutes"
            drawn = figures.heat_map("phones", matrix.numpy(), names, title)
            self.add(drawn, "Probability of each phone given each unit")
        # One of medium length shows speech rather than a single word.
        row = sorted(units, key=dataset.lengths.__getitem__)[len(units) // 2]
        waveform = dataset[row][: 3 * SAMPLE_RATE]
        shown = len(waveform) / SAMPLE_RATE
        self.page.heading("One utterance", "Units should change where phones do. Listen to it:")
        self.page.sound(waveform.numpy(), SAMPLE_RATE)
        drawn = figures.utterance(
            "utterance",
            spectrogram(waveform),
            shown,
            spans(phones.get(row, []), FRAME_STEP / 1000, shown),
            {f"layer {n}": spans(units[row][k].tolist(), step / 1000, shown) for k, n in enumerate(numbers)},
            f"{dataset.manifest['fileid'][row]}, first {shown:.1f} s",
        )
        self.add(drawn, "Spectrogram, phones and units of an utterance")

    def configuration(self) -> None:
        """List all settings."""
        self.page.heading("Configuration")
        for section, table in to_dict(self.cfg).items():
            flat = table if section != "validation" else {f"{n}.{k}": v for n, t in table.items() for k, v in t.items()}
            self.page.table([], [[key, json.dumps(value)] for key, value in flat.items()], folded=section)

    def write(self, output: Path) -> Path:
        """Write the page and the PNGs."""
        make_folder(output)
        page, files = output / "index.html", {output / f"{drawn.name}.png": drawn.png for drawn in self.drawn}
        for path, content in (files | {page: self.page.html().encode()}).items():
            with atomic_write(path) as file:
                file.write(content)
        return page


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the checkpoint to resume from, or a ``final.pt`` of weights only; None if there is none.

    Raises:
        InputError: There are checkpoints, but none can be used.
    """
    final = folder / "final.pt"
    try:
        return Checkpointer(folder, interval=0).find_latest()
    except InputError:
        if not final.exists():
            raise
    read_weights(final)
    return final


def spans(labels: Sequence[Any], step: float, duration: float) -> list[tuple[Any, float, float]]:
    """Runs of the same label as (label, start, end) in seconds, up to a duration."""
    found, position = [], 0
    for label, run in groupby(labels):
        start, position = position, position + len(list(run))
        if start * step < duration:
            found.append((label, start * step, min(position * step, duration)))
    return found


def spectrogram(waveform: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Power in dB, (257 frequencies up to 8 kHz, frames of 5 ms)."""
    spectrum = torch.stft(waveform, 512, 80, 400, torch.hann_window(400), return_complex=True)
    decibels: np.ndarray[Any, np.dtype[np.float32]] = (10 * spectrum.abs().square().clamp(min=1e-10).log10()).numpy()
    return decibels


def make_report(
    run: Path,
    output: Path | None = None,
    *,
    group: str | None = None,
    layer: int | None = None,
    max_minutes: float = 30.0,
    device: str = "auto",
) -> Path:
    """Write the report of a run, even while it trains.

    Args:
        run: The run folder.
        output: Folder for the report; None: ``report`` in the run folder.
        group: The validation set whose units are shown; None: the first that has alignments, else the first.
        layer: The layer whose units the heat map shows; None: the best.
        max_minutes: Maximum amount of audio of that set to encode.
        device: As ``run.device``.

    Returns:
        Path of the page.

    Raises:
        InputError: No run folder, or no such set.
    """
    if not os.path.isfile(run / "config.json"):  # noqa: PTH113 (False for all that cannot be a file)
        raise InputError(f"{run}: not a run folder, it has no config.json")
    cfg = read_config(run / "config.json")
    report = Report(run, cfg)
    if group is not None and group not in cfg.validation:
        raise InputError(f"{run}: no validation set {group!r}; there are: {', '.join(cfg.validation) or 'none'}")
    aligned = [name for name, data in cfg.validation.items() if data.alignments_path]
    group = group or next(iter([*aligned, *cfg.validation]), None)
    report.summary()
    report.training()
    for name in cfg.validation:
        report.quality(name)
    if group is not None:
        report.units(group, layer, max_minutes, device)
    report.configuration()
    return report.write(output or run / "report")

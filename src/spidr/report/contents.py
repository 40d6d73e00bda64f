"""What is on the page: gathered from a run folder, and written as ``index.html`` and its figures as PNG."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spidr.checkpoint import Checkpointer
from spidr.config import SAMPLE_RATE, Config, DataConfig, read_config, to_dict
from spidr.data import speech_dataset
from spidr.data.alignments import FRAME_STEP, read_alignments
from spidr.environment import Environment
from spidr.models.metrics import proba_phone_code
from spidr.models.weights import read_weights
from spidr.report import figures
from spidr.report.page import Page
from spidr.tools import healthy
from spidr.tools.errors import InputError
from spidr.tools.files import atomic_write, make_folder
from spidr.tools.metrics import Line, read_metrics
from spidr.validate import encode_rows, frame_step, load_trained, phones_of_rows

SHOWN_SECONDS = 3.0
"""How much of the utterance is shown."""

MEASURED_PER_STEP = {
    "Loss": ("loss",),
    "Gradient norm": ("grad_norm",),
    "Learning rate": ("lr",),
    "EMA decay": ("ema_decay",),
    "Audio seconds per second": ("audio_seconds_per_second",),
    "Share of time waiting for data": ("data_wait_share",),
}
QUALITY = {
    "pnmi": "PNMI",
    "phone_purity": "Phone purity",
    "cluster_purity": "Cluster purity",
    "unit_ppl": "Perplexity of the units",
    "active_codewords": "Active codewords",
    "bitrate": "Bits per second",
}


LARGEST = 1e100
"""A step or value beyond it is no measurement, and no axis can be drawn for it."""


def drawable(lines: Sequence[Line]) -> tuple[list[Line], list[str]]:
    """The lines without values that cannot be drawn, and what those are."""
    left_out: list[str] = []
    kept = []
    for line in lines:
        wrong = [key for key, value in line.items() if not isinstance(value, str | None) and not abs(value) < LARGEST]
        left_out += [f"{key} of {line['group']} at step {str(line['step'])[:20]}" for key in wrong]
        if "step" not in wrong:
            kept.append({key: value for key, value in line.items() if key not in wrong})
    return kept, left_out


def curve(lines: Sequence[Line], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, where there is one."""
    known = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in known], [value for _, value in known]


def by_layer(lines: Sequence[Line], name: str) -> figures.Curves:
    """The curves of a metric that each codebook has."""
    found = (re.fullmatch(rf"{name}_l(\d{{1,4}})", key, re.ASCII) for line in lines for key in line)
    layers = sorted({int(match[1]) for match in found if match})
    return {f"layer {layer}": curve(lines, f"{name}_l{layer}") for layer in layers}


@dataclass
class Report:
    """Collects the page and its figures."""

    folder: Path
    cfg: Config
    lines: list[Line]
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        self.page = Page(f"{self.cfg.run.wandb_project} / {self.cfg.run.wandb_name}")
        self.lines, self.left_out = drawable(self.lines)
        self.drawn: list[figures.Drawn] = []

    def add(self, drawn: figures.Drawn, description: str) -> None:
        """Put a figure on the page and keep it for its PNG."""
        self.drawn.append(drawn)
        self.page.figure(drawn, description)

    def group(self, name: str) -> list[Line]:
        """The lines of a group."""
        return [line for line in self.lines if line["group"] == name]

    # ------------------------------------------------------------------------------------------------- from metrics

    def summary(self) -> None:
        """What was trained and how far it is."""
        cfg = self.cfg
        step = max((line["step"] for line in self.lines), default=0)
        model = cfg.model
        self.page.text(
            f"{'SpidR' if cfg.run.model_type == 'spidr' else 'DinoSR'}, {model.encoder_num_layers} layers of "
            f"{model.encoder_embed_dim}, {model.num_codebooks} codebooks of {model.codebook_size}. "
            f"Step {step:,} of {cfg.optimizer.max_steps:,}."
        )
        _, speeds = curve(self.group("train"), "audio_seconds_per_second")
        trained = f"Trained at {np.median(speeds):,.0f} seconds of audio a second (median). " if speeds else ""
        self.page.text(f"{trained}Folder: {self.folder}", note=True)
        if self.left_out:
            rest = f" and {len(self.left_out) - 5} more" if len(self.left_out) > 5 else ""
            self.page.text(f"Left out, since it cannot be drawn: {', '.join(self.left_out[:5])}{rest}.", note=True)

    def training(self) -> None:
        """Losses, rates, throughput, and the use of the codebooks."""
        train = self.group("train")
        if not train:
            self.page.text("The run has logged nothing yet.", note=True)
            return
        panels: dict[str, figures.Curves] = {}
        for title, keys in MEASURED_PER_STEP.items():
            known = {key: curve(train, key) for key in keys}
            if any(x for x, _ in known.values()):
                panels[title] = known
        panels["Loss"] = {"training": curve(train, "loss")} | {
            name: curve(self.group(name), "loss") for name in self.cfg.validation if self.group(name)
        }
        self.page.heading(
            "Training",
            "The loss falls fast, then slowly, and validation follows; the gradient norm stays level. Little time "
            "should be spent waiting for data.",
        )
        bands = self._published(panels["Loss"])
        self.add(
            figures.curves("training", panels, bands),
            "Loss, gradient norm, learning rate, EMA decay and throughput by step",
        )
        self.page.heading(
            "Codebooks in training batches",
            "Perplexities rise in the first steps and then stay: one that falls towards 1 is of a collapsing codebook.",
        )
        names = {
            "target_ppl": "Perplexity of the targets",
            "pred_ppl": "Perplexity of the predictions",
            "active_codewords": "Active codewords",
        }
        use = {title: by_layer(train, name) for name, title in names.items()}
        self.add(figures.curves("codebooks", use), "Perplexities and active codewords of each layer by step")

    def _published(self, losses: figures.Curves) -> dict[str, figures.Band]:
        """What published runs of the base model did; a line on the page if this one does something else."""
        if self.cfg.run.init_ckpt is not None or not healthy.is_base(self.cfg.model):
            return {}
        last = max((x[-1] for x, _ in losses.values() if x), default=0)
        steps = [step for step in healthy.LOSS if step < last] + [last]
        for group in self.cfg.validation:
            lines = [line for line in self.group(group) if line.get("loss") is not None]
            active = [y[-1] for _, y in by_layer(self.group(group), "active_codewords").values() if y]
            if lines and (said := healthy.unlike_published(lines[-1]["step"], lines[-1]["loss"], active)):
                self.page.text(f"{group}: {said}.")
        low, high = zip(*map(healthy.expected_loss, steps), strict=True)
        return {"Loss": (steps, low, high)}

    def quality(self, group: str) -> None:
        """Unit quality over time, and its last values."""
        lines = self.group(group)
        panels = {title: by_layer(lines, name) for name, title in QUALITY.items()}
        panels = {title: curves for title, curves in panels.items() if curves}
        if not panels:
            self.page.text(
                f"No unit quality: [validation.{group}] has no alignments_path or is yet to come.", note=True
            )
            return
        self.page.heading(
            f"Units of {group}",
            "PNMI, the share of the phones' entropy that the units explain, and the purities against the alignments: "
            "higher is better. They are decided early and differ between layers.",
        )
        number = list(self.cfg.validation).index(group)
        name = f"units-{group}" if re.fullmatch(r"[\w.-]+", group) else f"units-{number}"
        self.add(figures.curves(name, panels), f"Quality of the units of {group} by step")
        layers = list(next(iter(panels.values())))
        rows = [[layer, *(f"{panels[title][layer][1][-1]:.4g}" for title in panels)] for layer in layers]
        self.page.text(f"At step {lines[-1]['step']:,}:")
        self.page.table(["", *panels], rows)

    # ------------------------------------------------------------------------------------------------- from the model

    def units(self, group: str, layer: int | None, max_minutes: float, device: str) -> None:
        """P(phone | unit) and one utterance, of the newest checkpoint."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            self.page.text("No checkpoint, so no units to show.", note=True)
            return
        data = self.cfg.validation[group]
        try:
            self._units(group, data, checkpoint, layer, max_minutes, device)
        except InputError as error:
            # The data may be gone from this machine; what the metrics tell is still worth a report.
            sys.stderr.write(f"warning: no units in the report: {error}\n")
            self.page.text(f"Units are not shown: {error}", note=True)

    def _units(
        self, group: str, data: DataConfig, checkpoint: Path, layer: int | None, max_minutes: float, device: str
    ) -> None:
        env = Environment.alone(device)
        model = load_trained(self.cfg, checkpoint).to(env.device)
        numbers = model.codebook_layers
        chosen = self._layer(group, layer, numbers)
        dataset = speech_dataset(data.manifest, normalize=data.normalize)
        phones = phones_of_rows(dataset.manifest, read_alignments(data.alignments_path)) if data.alignments_path else {}
        lengths = dataset.lengths
        rows = np.array(sorted(phones) or range(len(dataset)))
        rows = rows[np.cumsum(lengths[rows]) <= max_minutes * 60 * SAMPLE_RATE]
        if not len(rows):
            raise InputError(f"no recording of {data.manifest} fits into --max-minutes {max_minutes:g}")
        encoded = encode_rows(model, dataset, rows.tolist(), data.max_batch_length, env)
        units = {row: codebooks for row, codebooks, _ in encoded}
        step, size = frame_step(model), model.cfg.codebook_size
        if phones:
            codebook = numbers.index(chosen)
            aligned: Any = {str(row): (phones[row], u[codebook].numpy()) for row, u in units.items()}
            num_phones = len({phone for row in units for phone in phones[row]})
            matrix, names, order = proba_phone_code(
                aligned,
                num_units=size,
                num_phones=num_phones,
                only_active=True,
                frame_step=step,
                alignment_step=FRAME_STEP,
            )
            self.page.heading(
                f"Which phones the units of layer {chosen} stand for",
                "A dark diagonal: each unit stands for one phone. Pale columns are units that stand for nothing.",
            )
            title = (
                f"{len(order)} of {size} units active in {lengths[list(units)].sum() / SAMPLE_RATE / 60:.1f} minutes"
            )
            self.add(
                figures.heat_map("phones", matrix.numpy(), names, title), "Probability of each phone given each unit"
            )
        # One of middling length shows speech rather than a single word.
        row = sorted(units, key=lengths.__getitem__)[len(units) // 2]
        self.page.heading("One utterance", "Units should change where phones do. Listen to it:")
        waveform = dataset[row]
        shown = min(SHOWN_SECONDS, len(waveform) / SAMPLE_RATE)
        self.page.sound(waveform[: int(shown * SAMPLE_RATE)].numpy(), SAMPLE_RATE)
        of_units = {f"layer {n}": spans(units[row][k].tolist(), step / 1000, shown) for k, n in enumerate(numbers)}
        self.add(
            figures.utterance(
                "utterance",
                spectrogram(waveform[: int(shown * SAMPLE_RATE)]),
                shown,
                spans(phones[row], FRAME_STEP / 1000, shown) if row in phones else [],
                of_units,
                f"{dataset.manifest['fileid'][row]}, first {shown:.1f} s",
            ),
            "Spectrogram, phones and units of an utterance",
        )

    def _layer(self, group: str, layer: int | None, numbers: range) -> int:
        """The layer asked for, else the one with the best PNMI at the end, else the last."""
        if layer is not None:
            if layer not in numbers:
                raise InputError(
                    f"layer {layer} has no codebook; those of layers {numbers[0]} to {numbers[-1]} have one"
                )
            return layer
        last = next((line for line in reversed(self.group(group)) if f"pnmi_l{numbers[0]}" in line), {})
        return max(numbers, key=lambda number: (last.get(f"pnmi_l{number}") or 0, number))

    def configuration(self) -> None:
        """All settings."""
        self.page.heading("Configuration")
        for section, table in to_dict(self.cfg).items():
            flat = table if section != "validation" else {f"{n}.{k}": v for n, t in table.items() for k, v in t.items()}
            self.page.folded(section, {key: json.dumps(value) for key, value in flat.items()})

    def write(self, output: Path) -> Path:
        """Write the page and the PNGs."""
        make_folder(output)
        for drawn in self.drawn:
            with atomic_write(output / f"{drawn.name}.png") as file:
                file.write(drawn.png)
        with atomic_write(output / "index.html") as file:
            file.write(self.page.html().encode())
        return output / "index.html"


def newest_checkpoint(folder: Path) -> Path | None:
    """The one that the run would resume from, else a ``final.pt`` of weights only; None if there is no checkpoint.

    Raises:
        InputError: There are checkpoints, but none can be used.
    """
    final, problem = folder / "final.pt", ""
    try:
        if latest := Checkpointer(folder, interval=0).find_latest():
            return latest
    except InputError as error:
        problem = str(error)
    if final.exists():
        read_weights(final)
        return final
    if problem or (names := [path.name for path in folder.glob("step_*.pt") if path.stem[5:].isdecimal()]):
        raise InputError(problem or f"{folder}: none of its checkpoints can be used: {', '.join(sorted(names))}")
    return None


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
    """Write the report of a run, also of one that is still training.

    Args:
        run: The run folder.
        output: Where to; None: ``report`` in the run folder.
        group: The validation set whose units are shown; None: the first that has alignments, else the first.
        layer: Whose units the heat map shows; None: the best.
        max_minutes: How much of that set to encode at most.
        device: As ``run.device``.

    Returns:
        The page.

    Raises:
        InputError: No run folder, or no such set.
    """
    if not os.path.isfile(run / "config.json"):  # noqa: PTH113 (False for all that cannot be a file)
        raise InputError(f"{run}: not a run folder, it has no config.json")
    cfg = read_config(run / "config.json")
    report = Report(run, cfg, sorted(read_metrics(run / "metrics.jsonl"), key=lambda line: line["step"]))
    report.checkpoint = newest_checkpoint(run)
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

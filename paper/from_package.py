"""Figures computed by the package: learning-rate and teacher schedules (5), masks (6)."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from style import BLUE, GREY, MODEL_STYLES, ORANGE, new_figure

from spidr.config import DinoSRConfig, MaskingConfig, OptimizerConfig, SpidRConfig
from spidr.data.masks import MaskGenerator
from spidr.models.dinosr import ema_scheduler
from spidr.models.spidr import exp_ema_scheduler
from spidr.optimizer import lr_factor

FRAME_SECONDS = 0.02


def schedules() -> Figure:
    """Figure 5. Learning rate and teacher decay of SpidR and DinoSR over the paper's 400,000 steps."""
    optimizer, spidr, dinosr = OptimizerConfig(), SpidRConfig(), DinoSRConfig()
    steps = np.arange(0, optimizer.max_steps + 1, 500)
    rates = [optimizer.lr * lr_factor(int(step), optimizer) for step in steps]
    teachers = {
        "spidr": [
            exp_ema_scheduler(int(t), spidr.ema_start_decay, spidr.ema_timescale, spidr.ema_threshold) for t in steps
        ],
        "dinosr_original": [
            ema_scheduler(
                int(t), dinosr.ema_start_decay, dinosr.ema_final_decay, dinosr.ema_final_step, dinosr.freeze_step
            )
            for t in steps
        ],
    }
    figure, (top, bottom) = new_figure(2.9, 2, sharex=True)
    top.plot(steps / 1000, np.array(rates) * 1e4, color=GREY)
    top.set(ylabel="Learning rate (10⁻⁴)", ylim=(0, None))
    for (model, decays), (name, linestyle) in zip(teachers.items(), [("SpidR", "-"), ("DinoSR", "--")], strict=True):
        distance = 1 - np.array(decays)
        moving = distance > 0
        color, _ = MODEL_STYLES[model]
        bottom.plot(steps[moving] / 1000, distance[moving], color=color, linestyle=linestyle, label=name)
        bottom.plot(steps[moving][-1] / 1000, distance[moving][-1], "x", color=color, markersize=5)
    exponents = range(3, 8)
    bottom.set(
        yscale="log",
        yticks=[10.0**-n for n in exponents],
        yticklabels=[f"1 − 10$^{{-{n}}}$" for n in exponents],
        ylabel="Teacher decay β",
        xlabel="Training step (thousands)",
        xlim=(0, optimizer.max_steps / 1000),
    )
    bottom.invert_yaxis()
    bottom.minorticks_off()
    bottom.plot([], [], "x", color=GREY, markersize=5, linestyle="", label="from here on β = 1")
    bottom.legend(loc="upper right")
    figure.align_ylabels()
    return figure


def masks(rows: int = 8, seconds: int = 10) -> Figure:
    """Figure 6. Masks of some utterances, and the lengths of masked stretches, as overlapping spans merge."""
    cfg = MaskingConfig()
    frames = int(seconds / FRAME_SECONDS) - 1
    draw = MaskGenerator(cfg).frames.draw
    shown = _dense(draw(np.full(rows, frames), [np.random.default_rng(5)]), frames)
    # One utterance at a time: equalising the number of masked frames in a batch would break stretches.
    many = [_dense(draw(np.full(1, frames), [np.random.default_rng(seed)]), frames)[0] for seed in range(2000)]
    lengths = np.concatenate([lengths_of_runs(mask) for mask in many]) * FRAME_SECONDS * 1000
    figure, (top, bottom) = new_figure(2.9, 2, height_ratios=[1.25, 1])
    extent = (0, frames * FRAME_SECONDS, rows + 0.5, 0.5)
    for row, mask in enumerate(shown, start=1):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]]).astype(int))) * FRAME_SECONDS
        top.broken_barh([(0, extent[1])], (row - 0.35, 0.7), color="#DDDDDD", linewidth=0)
        spans = [(a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        top.broken_barh(spans, (row - 0.35, 0.7), color=BLUE, linewidth=0)
    top.set(xlabel="Time (s)", ylabel="Utterance", xlim=extent[:2], ylim=extent[2:], yticks=range(1, rows + 1))
    top.set_title(f"Masked frames (blue): {100 * shown.mean():.0f} % of each utterance", loc="left")
    top.grid(visible=False)
    span = cfg.mask_length * FRAME_SECONDS * 1000
    bottom.hist(lengths, bins=list(range(-10, 1010, 40)), weights=np.full(len(lengths), 100 / len(lengths)), color=BLUE)
    bottom.axvline(lengths.mean(), color=ORANGE, linestyle="--")
    bottom.annotate(
        f"mean {lengths.mean():.0f} ms,\nspans of {span:.0f} ms",
        (lengths.mean(), bottom.get_ylim()[1] * 0.6),
        xytext=(6, 0),
        textcoords="offset points",
    )
    bottom.set(xlabel="Length of a masked stretch (ms)", ylabel="Share (%)", xlim=(0, 1000))
    return figure


def _dense(positions: np.ndarray, frames: int) -> np.ndarray:
    mask = np.zeros((len(positions), frames), dtype=bool)
    np.put_along_axis(mask, positions, values=True, axis=1)
    return mask


def lengths_of_runs(mask: np.ndarray) -> np.ndarray:
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    return edges[1::2] - edges[::2]

"""The style of the figures: column width, a colour and marker per model, lines that differ even without colour."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

WIDTH = 3.3
"""Inches: one of two columns."""

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73"),
    *("#F0E442", "#0072B2", "#D55E00", "#CC79A7"),
)
GREY = "#777777"

MODEL_STYLES = {
    "spidr": (BLUE, "o"),
    "dinosr_original": (ORANGE, "s"),
    "dinosr_reproduced": (VERMILLION, "D"),
    "hubert": (GREEN, "^"),
    "wavlm": (SKY, "v"),
    "wav2vec2": (PURPLE, "P"),
    "text": (BLACK, "X"),
}
"""Colour and marker."""

SETTINGS: dict[str, Any] = {
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.2,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.labelspacing": 0.35,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "pdf.fonttype": 42,  # text stays text
    "savefig.dpi": 300,
}


def new_figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of column width and its axes, row after row."""
    mpl.rcParams.update(SETTINGS)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, **options)
    return figure, list(axes.flat)


def legend_only(axes: Axes, handles: list[Line2D], **options: Any) -> None:
    """Use a panel for the legend only."""
    axes.axis("off")
    axes.legend(handles=handles, loc="center", **options)


def model_handle(model: str, label: str, **options: Any) -> Line2D:
    """Legend entry of a model."""
    color, marker = MODEL_STYLES[model]
    return Line2D([], [], **{"color": color, "marker": marker, "label": label, **options})


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``NAME.pdf`` and ``NAME.png``; the same figure gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.pdf", folder / f"{name}.png"]
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # once is enough
    for path in paths:
        aside = path.with_name(f".{os.getpid()}.{path.name}")
        figure.savefig(
            aside, format=path.suffix[1:], metadata={"CreationDate": None} if path.suffix == ".pdf" else None
        )
        aside.replace(path)
    plt.close(figure)
    return paths

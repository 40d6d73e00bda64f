"""Figures of the paper's measured values (2 to 4, 7 and 11 to 16)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullFormatter, ScalarFormatter
from published import BEST_LAYER, METRICS, MODELS, perplexities, pretraining_hours, results
from style import BLUE, GREY, MODEL_STYLES, ORANGE, legend_only, model_handle, new_figure

LM_HOURS = 6000
"""Hours of training data of the spoken language models that are compared by layer."""
MAIN_TASKS = ("swuggy_all", "sblimp", "tsc")
ALL_LAYERS = ("spidr", "hubert")
"""Models with a spoken language model for the units of every layer (figures 13 and 14)."""
LINES = {"continuous": "-", "probabilities": "--", "codebooks": "-", "kmeans": "--", "text": ":"}
SHORT = {"dinosr_original": "DinoSR (orig.)", "dinosr_reproduced": "DinoSR (repr.)"}


def perplexity_while_training() -> Figure:
    """Figure 2. Perplexity of targets and predictions of each layer's codebook (256 codewords) on dev-clean."""
    table = perplexities().filter(dataset="dev-clean")
    layers = sorted(table["layer"].unique())
    colors = colormaps["viridis"](np.linspace(0, 0.93, len(layers)))
    figure, axes = new_figure(3.6, 2, 2, sharex=True, sharey=True)
    panels = [(model, metric) for metric in ("target_ppl", "pred_ppl") for model in ("spidr", "dinosr")]
    for ax, (model, metric) in zip(axes, panels, strict=True):
        for layer, color in zip(layers, colors, strict=True):
            line = table.filter(model=model, metric=metric, layer=layer).sort("step")
            dashes = "--" if layer % 2 else "-"  # neighbouring colours are too similar
            ax.plot(line["step"] / 1000, line["value"], dashes, color=color, label=str(layer))
        name = {"spidr": "SpidR", "dinosr": "DinoSR"}[model]
        ax.set_title(f"{name}, {'targets' if metric == 'target_ppl' else 'predictions'}")
        ax.set(xlim=(0, 400), ylim=(40, 256), xticks=[0, 200, 400], yticks=[64, 128, 192, 256])
    figure.get_layout_engine().set(wspace=0.12)  # keeps neighbouring labels apart
    figure.supxlabel("Training step (thousands)", fontsize=7)
    figure.supylabel("Perplexity", fontsize=7)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="Layer", loc="outside right center", handlelength=1.8)
    return figure


def spoken_lm_by_hours() -> Figure:
    """Figure 3. Accuracy of spoken language models against hours of training, each model with its better units."""
    best = dict.fromkeys(("dinosr_original", "dinosr_reproduced"), "codebooks")
    best |= {"spidr": "kmeans", "hubert": "kmeans", "text": "text"}
    return _by_hours(MAIN_TASKS, [(model, best[model]) for model in MODELS if model in best], height=2.9)


def spoken_lm_by_hours_all() -> Figure:
    """Figure 15. Like figure 3, for all tasks, with units from codebooks and from k-means."""
    series = [(model, "codebooks") for model in ("spidr", "dinosr_original", "dinosr_reproduced")]
    series += [(model, "kmeans") for model in ("spidr", "dinosr_original", "dinosr_reproduced", "hubert")]
    return _by_hours(("swuggy_all", "swuggy_invocab", "sblimp", "tsc", "ssc"), [*series, ("text", "text")], height=4.4)


def _by_hours(tasks: Sequence[str], series: Sequence[tuple[str, str]], height: float) -> Figure:
    table = results("spoken_lm").filter((pl.col.num_units == 256) | (pl.col.model == "text"))
    table = table.filter(
        pl.col.layer.is_null() | (pl.col.layer == pl.col.model.replace_strict(BEST_LAYER, default=None))
    )
    figure, axes = new_figure(height, (len(tasks) + 2) // 2, 2, sharex=True)
    for ax, task in zip(axes, tasks, strict=False):
        for model, representation in series:
            line = table.filter(model=model, representation=representation, metric=task).sort("lm_hours")
            if not line.is_empty():
                _line(ax, model, representation, line["lm_hours"], line["value"])
        ax.set_title(METRICS[task])
        ax.set(xscale="log", xticks=[600, 6000, 60_000], xticklabels=["600", "6k", "60k"], xlim=(450, 80_000))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.minorticks_off()
        _chance(ax)
        ax.tick_params(labelbottom=True)
    for ax in axes[-3:-1]:
        ax.set_xlabel("LM training data (hours)")
    for ax in axes[::2]:
        ax.set_ylabel("Accuracy (%)")
    figure.align_ylabels()
    legend_only(axes[-1], [*_handles(series), Line2D([], [], color=GREY, linestyle=":", label="chance")])
    return figure


def pretraining_time() -> Figure:
    """Figure 4. Hours to pretrain SpidR for 400,000 steps, against the number of GPUs."""
    table = pretraining_hours()
    figure, (ax,) = new_figure(2.3)
    for (gpu, compiled), line in table.sort("gpus").group_by("gpu_type", "compile", maintain_order=True):
        color, marker = {"a100": (ORANGE, "s"), "h100": (BLUE, "o")}[str(gpu)]
        label = f"{str(gpu).upper()}, {'compiled' if compiled else 'not compiled'}"
        ax.plot(line["gpus"], line["hours"], "-" if compiled else "--", color=color, marker=marker, label=label)
        for gpus, hours in line.select("gpus", "hours").iter_rows():
            place = {"xytext": (-4, -2), "ha": "right", "va": "top"}
            if gpus == table["gpus"].max():
                place = {"xytext": (5, 0), "ha": "left", "va": "center"}
            elif not compiled:
                place = {"xytext": (3, 1), "ha": "left", "va": "bottom"}
            text = ax.annotate(
                f"{hours}", (gpus, hours), textcoords="offset points", color=color, fontsize=6.5, **place
            )
            text.set_path_effects([withStroke(linewidth=1.8, foreground="white")])
    ax.set(xscale="log", yscale="log", xticks=[4, 8, 16], yticks=[12, 24, 48, 96], ylim=(11, 140), xlim=(3.4, 20))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(ScalarFormatter())
    ax.minorticks_off()
    ax.set(xlabel="GPUs", ylabel="Pretraining time (hours)")
    ax.legend(loc="upper right")
    return figure


def continuous_by_layer() -> Figure:
    """Figure 7. ABX error (mean of clean, other, within, across) and MAP of words (mean of clean and other) by layer.

    For features and for the probabilities that the heads predict.
    """
    models = ("spidr", "dinosr_original", "dinosr_reproduced", "hubert")
    series = [(model, "continuous") for model in models] + [(model, "probabilities") for model in models[:3]]
    return _by_layer([("abx", mean_by_layer("abx")), ("map", mean_by_layer("map"))], series)


def discrete_by_layer() -> Figure:
    """Figure 11. ABX error (mean of clean, other, within, across) and PNMI of discrete units by layer."""
    models = ("spidr", "dinosr_original", "dinosr_reproduced")
    series = [(model, "codebooks") for model in models]
    series += [(model, "kmeans") for model in (*models, "hubert", "wavlm", "wav2vec2")]
    pnmi = results("unit_quality").filter(metric="pnmi")
    return _by_layer([("abx", mean_by_layer("abx")), ("pnmi", pnmi)], series)


def _by_layer(panels: Iterable[tuple[str, pl.DataFrame]], series: Sequence[tuple[str, str]]) -> Figure:
    figure, axes = new_figure(4.1, 2, sharex=True)
    for ax, (metric, table) in zip(axes, panels, strict=True):
        for model, representation in series:
            line = table.filter(model=model, representation=representation).sort("layer")
            if not line.is_empty():
                _line(ax, model, representation, line["layer"], line["value"])
        ax.set_ylabel({"abx": "ABX error (%) ↓", "map": "MAP (%) ↑", "pnmi": "PNMI ↑"}[metric])
        ax.set(xticks=range(1, 13), xlim=(0.5, 12.5))
    axes[-1].set_xlabel("Layer")
    figure.align_ylabels()
    figure.legend(handles=_handles(series), loc="outside upper center", ncols=2)
    return figure


def spoken_lm_by_layer() -> Figure:
    """Figure 12. Accuracy of spoken language models trained on 6,000 hours, by the layer their units come from."""
    table = results("spoken_lm").filter(num_units=256, lm_hours=LM_HOURS)
    series = [("spidr", "codebooks"), ("spidr", "kmeans"), ("hubert", "kmeans")]
    figure, axes = new_figure(4.4, 3, 2, sharex=True)
    for ax, task in zip(axes, ("swuggy_all", "swuggy_invocab", "sblimp", "tsc", "ssc"), strict=False):
        for model, representation in series:
            line = table.filter(model=model, representation=representation, metric=task).sort("layer")
            _line(ax, model, representation, line["layer"], line["value"])
        ax.set_title(METRICS[task])
        ax.set(xticks=[1, 3, 5, 7, 9, 11], xlim=(0.5, 12.5))
        _chance(ax)
    for ax in axes[-3:-1]:
        ax.tick_params(labelbottom=True)
    for ax in axes[::2]:
        ax.set_ylabel("Accuracy (%)")
    axes[-2].set_xlabel("Layer")
    legend_only(axes[-1], [*_handles(series), Line2D([], [], color=GREY, linestyle=":", label="chance")])
    return figure


def spoken_lm_against_features() -> Figure:
    """Figure 13. Spoken language models (6,000 hours) against ABX error and MAP of the source of their units.

    The source is the features for k-means units, and the probabilities that the heads predict for codebook units.
    """
    made_from = {"continuous": "kmeans", "probabilities": "codebooks"}
    tables = [
        mean_by_layer(metric)
        .filter(pl.col.representation.is_in(list(made_from)))
        .with_columns(pl.col.representation.replace(made_from))
        for metric in ("abx", "map")
    ]
    return _against(list(zip(("ABX error (%)", "MAP (%)"), tables, strict=True)), ALL_LAYERS)


def spoken_lm_against_units() -> Figure:
    """Figure 14. Spoken language models (6,000 hours) against ABX error and PNMI of their units."""
    pnmi = results("unit_quality").filter(metric="pnmi")
    return _against([("ABX error of units (%)", mean_by_layer("abx")), ("PNMI", pnmi)], ALL_LAYERS)


def spoken_lm_against_superb() -> Figure:
    """Figure 16. Spoken language models (6,000 hours, k-means units) against phone and word recognition (SUPERB)."""
    superb = results("superb").with_columns(representation=pl.lit("kmeans"))
    layers = pl.col.model.replace_strict(BEST_LAYER, return_dtype=pl.Int64)
    tables = [superb.filter(metric=metric).with_columns(layer=layers) for metric in ("per", "asr")]
    return _against(list(zip(("Phone error rate (%)", "Word error rate (%)"), tables, strict=True)))


def _against(columns: Sequence[tuple[str, pl.DataFrame]], models: Sequence[str] = tuple(MODELS)) -> Figure:
    """Plot accuracies against measures: a row of panels per task, a column per measure, with Pearson's r."""
    spoken = results("spoken_lm").filter(pl.col.model.is_in(models), num_units=256, lm_hours=LM_HOURS)
    key = ["model", "representation", "layer"]
    figure, axes = new_figure(4.6, len(MAIN_TASKS), len(columns), sharex="col", sharey="row")
    shown: set[tuple[str, str]] = set()
    for index, ax in enumerate(axes):
        task, (label, table) = MAIN_TASKS[index // len(columns)], columns[index % len(columns)]
        points = spoken.filter(metric=task).join(table.select(*key, x="value"), on=key).sort(key)
        for (model, representation), group in points.group_by("model", "representation", maintain_order=True):
            color, marker = MODEL_STYLES[str(model)]
            filled = color if representation == "codebooks" else "none"
            ax.plot(group["x"], group["value"], marker, color=color, markerfacecolor=filled, markeredgewidth=0.8)
            shown.add((str(model), str(representation)))
        r = np.corrcoef(points["x"], points["value"])[0, 1]
        ax.margins(x=0.1, y=0.12)
        ax.set_title(f"r = {r:.2f}".replace("-", "−") + f", n = {len(points)}", loc="right", fontsize=6.5, pad=2)
        if index % len(columns) == 0:
            ax.set_ylabel(f"{METRICS[task]} (%)")
        if index >= len(axes) - len(columns):
            ax.set_xlabel(label)
    series = [(m, r) for r in ("codebooks", "kmeans") for m in MODELS if (m, r) in shown]
    figure.legend(handles=_handles(series, linestyle=""), loc="outside upper center", ncols=2)
    figure.align_ylabels()
    return figure


def mean_by_layer(experiment: str) -> pl.DataFrame:
    """``model, representation, layer, value``: mean over datasets and speaker conditions."""
    table = results(experiment).group_by("model", "representation", "layer").agg(pl.col.value.mean())
    return table.sort("model", "representation", "layer")


def _line(ax: Axes, model: str, representation: str, x: Iterable[float], y: Iterable[float]) -> None:
    ax.plot(list(x), list(y), **_look(model, representation))


def _look(model: str, representation: str) -> dict[str, Any]:
    color, marker = MODEL_STYLES[model]
    dashed = LINES[representation] == "--"
    return {
        "color": color,
        "marker": marker,
        "linestyle": LINES[representation],
        "markerfacecolor": "white" if dashed else color,
        "markeredgewidth": 0.8,
    }


def _handles(series: Iterable[tuple[str, str]], **options: Any) -> list[Line2D]:
    names = {"probabilities": "probabilities", "codebooks": "codebooks", "kmeans": "k-means", "continuous": "features"}
    handles = []
    for model, representation in series:
        label = SHORT.get(model, MODELS[model])
        label += f", {names[representation]}" if representation in names else ""
        handles.append(model_handle(model, label, **{**_look(model, representation), **options}))
    return handles


def _chance(ax: Axes) -> None:
    ax.axhline(50, color=GREY, linestyle=":", linewidth=0.9)

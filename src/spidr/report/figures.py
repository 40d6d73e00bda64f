"""The figures of a report, as SVG with the page's colours and as PNG.

Matplotlib writes colours into its SVG. The ones used here (``INK``, ``GRID``, the series) are replaced by the page's
variables, so that figures are readable on light and dark pages; PNGs have the light page's colours.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

INK, MUTED, GRID = "#1a1c1f", "#5b6068", "#d5d8dd"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#5f4bb6", "#2a9fc9", "#a3442a")
"""Colours that the colour-blind can tell apart on white, mostly Okabe and Ito's; dark pages have lighter ones."""

PAGE_COLOURS = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {c: f"--s{i}" for i, c in enumerate(SERIES)}
BLUES = LinearSegmentedColormap.from_list("blues", [(0.13, 0.55, 0.9, 0.0), (0.13, 0.55, 0.9, 1.0)])
"""From transparent to blue, so that the page shows through at zero."""

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # name → steps and values

STYLE: dict[Any, Any] = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=SERIES),
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "font.size": 9,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names from files may contain dollar signs
}


class Drawn:
    """A drawn figure: ``svg`` for the page, ``png`` for elsewhere."""

    def __init__(self, name: str, draw: Callable[[Figure], None], size: tuple[float, float]) -> None:
        # Ids must differ between SVGs, since all of them are on one page.
        with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            svg, png = io.StringIO(), io.BytesIO()
            figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
            figure.savefig(png, format="png", dpi=150, facecolor="white")
        self.name, self.png = name, png.getvalue()
        self.svg = _for_page(svg.getvalue(), name)


def _for_page(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*" ([^>]*?)height="[^"]*"', r"<svg \1\2", svg, count=1)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", svg)
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


Band = tuple[Sequence[float], Sequence[float], Sequence[float]]  # steps, and the lowest and highest normal values there


def curves(name: str, panels: Mapping[str, Curves], bands: Mapping[str, Band] | None = None) -> Drawn:
    """Draw lines over steps, in panels side by side.

    A panel of one curve has no legend, and panels of the same curves share one. ``bands`` lie behind a panel's
    curves.
    """
    columns, bands = min(len(panels), 3), bands or {}
    lines = -(-len(panels) // columns)
    several = [list(lines_of) for lines_of in panels.values() if len(lines_of) > 1]
    in_common = len(several) == len(panels) and all(labels == several[0] for labels in several)

    def draw(figure: Figure) -> None:
        for i, (title, lines_of) in enumerate(panels.items(), start=1):
            ax = figure.add_subplot(lines, columns, i)
            ax.set_title(title)
            ax.set_xlabel("step")
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            ax.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}")
            if title in bands:
                steps, low, high = bands[title]
                ax.fill_between(steps, low, high, color=MUTED, alpha=0.2, linewidth=0, label="published")
            for k, (label, (x, y)) in enumerate(lines_of.items()):
                style = "-" if k < len(SERIES) else "--"
                ax.plot(x, y, style, label=label, marker="o" if len(x) < 15 else None, markersize=2.5)
            if (len(lines_of) > 1 or title in bands) and not in_common:
                ax.legend(ncols=2 if len(lines_of) > 4 else 1)
            ax.margins(x=0.02)
            ax.ticklabel_format(axis="y", useOffset=False)
            bottom, top = ax.get_ylim()
            middle = (bottom + top) / 2
            if top - bottom < abs(middle) / 2000:  # a flat line rather than its last digits
                ax.set_ylim(middle - abs(middle) / 2000, middle + abs(middle) / 2000)
        if in_common:
            figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8)

    return Drawn(name, draw, (3.5 * columns, 2.6 * lines + 0.3 * in_common))


def heat_map(name: str, probabilities: NDArray[Any], phones: Sequence[str], title: str) -> Drawn:
    """P(phone | unit), phones down, units across, as ordered by :func:`spidr.models.metrics.proba_phone_code`."""

    def draw(figure: Figure) -> None:
        ax = figure.add_subplot()
        ax.grid(visible=False)
        image = ax.imshow(probabilities, cmap=BLUES, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        ax.set_yticks(range(len(phones)), phones, fontsize=7)
        ax.set_xticks([])  # columns are not ordered by unit number
        ax.set_xlabel("unit, grouped by most likely phone")
        ax.set_title(title)
        bar = figure.colorbar(image, ax=ax, pad=0.01, aspect=40)
        bar.ax.grid(visible=False)
        bar.set_label("P(phone | unit)")

    return Drawn(name, draw, (10.5, max(2.5, 0.13 * len(phones) + 1)))


def utterance(
    name: str,
    spectrogram: NDArray[Any],
    duration: float,
    phones: Sequence[tuple[str, float, float]],
    units: Mapping[str, Sequence[tuple[int, float, float]]],
    title: str,
) -> Drawn:
    """Draw a spectrogram in dB (frequencies up to 8 kHz, frames), the phones, and the units of each codebook below it.

    Phones and units, the latter by row label, are (label, start, end) in seconds of the ``duration`` shown.
    """
    rows = {"phones": phones, **units} if phones else dict(units)

    def draw(figure: Figure) -> None:
        heights = {"height_ratios": [5] + [1] * len(rows), "hspace": 0.02}
        first, *others = figure.subplots(1 + len(rows), 1, sharex=True, squeeze=False, gridspec_kw=heights)[:, 0]
        top, extent = float(spectrogram.max()), (0, duration, 0, 8)
        first.imshow(spectrogram, "magma", origin="lower", aspect="auto", extent=extent, vmin=top - 80, vmax=top)
        first.set_ylabel("kHz")
        first.set_title(title)
        first.grid(visible=False)
        for k, (ax, (label, intervals)) in enumerate(zip(others, rows.items(), strict=True)):
            _intervals(ax, intervals, duration, INK if label == "phones" else SERIES[k % len(SERIES)])
            ax.set_ylabel(label, rotation=0, ha="right", va="center")
        figure.axes[-1].set_xlabel("seconds")
        figure.axes[-1].set_xlim(0, duration)

    return Drawn(name, draw, (10.5, 2.6 + 0.35 * len(rows)))


def _intervals(ax: Axes, intervals: Sequence[tuple[Any, float, float]], duration: float, colour: str) -> None:
    ax.grid(visible=False)
    ax.set_yticks([])
    ax.set_ylim(0, 1)
    ax.spines["left"].set_visible(False)
    for i, (label, start, end) in enumerate(intervals):
        ax.axvspan(start, end, facecolor=colour, alpha=0.10 if i % 2 else 0.25, linewidth=0)
        room = (end - start) / duration * 165  # number of smallest letters that fit across the figure
        if room >= 1:  # write short ones vertically
            fits = room >= len(str(label))
            place: dict[str, Any] = {"ha": "center", "va": "center", "clip_on": True, "rotation": 0 if fits else 90}
            ax.text((start + end) / 2, 0.5, str(label), fontsize=6 if fits else 5, **place)

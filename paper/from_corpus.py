"""Figures of features and units extracted from a corpus: phone embeddings (8, 9) and P(phone | unit) (10)."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from sklearn.manifold import TSNE
from style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, WIDTH, YELLOW, new_figure

from spidr.data.alignments import read_alignments
from spidr.data.names import match_names
from spidr.data.units import read_units
from spidr.evaluate import FeatureFolder
from spidr.models.metrics import proba_phone_code
from spidr.tools.errors import InputError

FRAMES = 2
"""Alignment frames (10 ms) per model frame (20 ms)."""
SILENCE = {"SIL", "SPN", "sil", "spn", "sp", ""}
CLASSES = {
    "vowels": (BLUE, "AA AE AH AO EH ER IH IY UH UW"),
    "diphthongs": (SKY, "AW AY EY OW OY"),
    "glides, liquids": (GREEN, "L R W Y"),
    "nasals": (PURPLE, "M N NG"),
    "stops": (VERMILLION, "P B T D K G"),
    "affricates": (YELLOW, "CH JH"),
    "fricatives": (ORANGE, "F V TH DH S Z SH ZH HH"),
}
CLASS_OF = {phone: name for name, (_, phones) in CLASSES.items() for phone in phones.split()}
SPEAKER_COLORS = (BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, BLACK)

Segments = tuple[np.ndarray, list[str], list[str]]
"""Mean features ``(segments, D)``, phones and speakers."""


def phone_segments(features: Path, alignments: Mapping[str, list[str]], limit: int, seed: int = 0) -> Segments:
    """Mean features of phone segments, without silences.

    Args:
        features: Folder of ``NAME.pt`` or ``NAME.npy``, ``(T, D)`` at 50 Hz.
        alignments: Phones of each recording, one per 10 ms.
        limit: Number of segments to keep, drawn at random.
        seed: Seed of the draw.

    Raises:
        InputError: There is no such file, none has an alignment, or one does not fit its alignment.
    """
    recordings = FeatureFolder(features)
    matched = {name: alignments[found] for name, found in match_names(dict(alignments), recordings).items()}
    segments = [
        (name, start, stop, phone)
        for name, phones in sorted(matched.items())
        for start, stop, phone in _segments(phones)
        if phone not in SILENCE
    ]
    if not segments:
        raise InputError(f"{features}: none of the {len(recordings)} recordings is aligned, such as {min(recordings)}.")
    chosen = np.random.default_rng(seed).permutation(len(segments))[:limit]
    means, phones, speakers = [], [], []
    loaded: tuple[str, np.ndarray] = ("", np.empty(0))
    for name, start, stop, phone in (segments[index] for index in sorted(chosen)):
        if loaded[0] != name:
            loaded = (name, _fitting(recordings[name], len(matched[name]), features / name))
        # Model frames centred in the segment, at least one.
        first = min((start + FRAMES // 2) // FRAMES, len(loaded[1]) - 1)
        last = max(first + 1, (stop + FRAMES // 2) // FRAMES)
        means.append(loaded[1][first:last].mean(0))
        phones.append(phone.rstrip("012"))
        speakers.append(PurePath(name).name.split("-")[0])
    return np.stack(means), phones, speakers


def _fitting(features: np.ndarray, frames: int, path: Path) -> np.ndarray:
    if abs(len(features) * FRAMES - frames) > 2 * FRAMES:
        raise InputError(f"{path}: {len(features)} frames, expected about {frames // FRAMES} as in its alignment.")
    return features.astype(np.float32)


def _segments(phones: Sequence[str]) -> list[tuple[int, int, str]]:
    """Stretches of the same phone: first frame, frame after the last, phone."""
    changes = [0, *(i for i in range(1, len(phones)) if phones[i] != phones[i - 1]), len(phones)]
    return [(a, b, phones[a]) for a, b in itertools.pairwise(changes) if b > a]


def embed(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """t-SNE of rows, standardised, in two dimensions."""
    features = (features - features.mean(0)) / (features.std(0) + 1e-5)
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)


def embeddings(folders: Sequence[Path], alignments: Path, limit: int) -> tuple[Figure, Figure]:
    """Figures 8 and 9. t-SNE of phone segments (mean features), coloured by phone class (8) and speaker (9).

    A good layer separates phones and mixes speakers. There is one panel per folder, to compare layers or models.
    """
    aligned = read_alignments(alignments)
    panels = []
    for folder in folders:
        means, phones, speakers = phone_segments(folder, aligned, limit)
        panels.append((folder.name, embed(means), phones, speakers))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    height = 0.35 + rows * (3.2 if columns == 1 else 1.75)
    by_phone, phone_axes = new_figure(height, rows, columns)
    by_speaker, speaker_axes = new_figure(height, rows, columns)
    common = sorted(speaker for speaker, _ in Counter(panels[0][3]).most_common(len(SPEAKER_COLORS)))
    for index, (title, points, phones, speakers) in enumerate(panels):
        classes = [CLASS_OF.get(phone, "other") for phone in phones]
        colors = {name: color for name, (color, _) in CLASSES.items() if name in classes}
        scatter(phone_axes[index], points, classes, colors)
        name_phones(phone_axes[index], points, phones, width_of_points(columns))
        scatter(speaker_axes[index], points, speakers, dict(zip(common, SPEAKER_COLORS, strict=False)))
        if len(panels) > 1:
            for axes in (phone_axes, speaker_axes):
                axes[index].set_title(title)
    for figure, axes in ((by_phone, phone_axes), (by_speaker, speaker_axes)):
        for ax in axes[len(panels) :]:
            ax.axis("off")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, handlelength=0.8, markerscale=2.5)
    return by_phone, by_speaker


def scatter(ax: Axes, points: np.ndarray, groups: Sequence[str], colors: Mapping[str, str]) -> None:
    """Draw the points of each group in its colour, and all others in grey."""
    groups_array = np.array(groups)
    others = ~np.isin(groups_array, list(colors))
    if others.any():
        ax.scatter(points[others, 0], points[others, 1], s=1.5, color="#CCCCCC", linewidths=0, label="others")
    for name, color in colors.items():
        chosen = points[groups_array == name]
        ax.scatter(chosen[:, 0], chosen[:, 1], s=2.5, color=color, linewidths=0, alpha=0.8, label=name)
    ax.set(xticks=[], yticks=[])
    ax.set_aspect("equal", adjustable="datalim")
    for spine in ax.spines.values():
        spine.set(visible=True, color=GREY)
    ax.grid(visible=False)


def width_of_points(columns: int) -> float:
    """Approximate width of a panel's points on paper, in 1/72 inch."""
    return 72 * 0.8 * WIDTH / columns


def name_phones(ax: Axes, points: np.ndarray, phones: Sequence[str], width: float) -> None:
    """Write each phone at the median of its points, frequent phones first, unless another label is in the way.

    Args:
        ax: The panel.
        points: (N, 2).
        phones: One per point.
        width: Width of the points on paper, in 1/72 inch.
    """
    room = np.array([13, 8]) * np.ptp(points, axis=0).max() / width  # the size of a label
    taken: list[np.ndarray] = []
    for phone, count in Counter(phones).most_common():
        place = np.median(points[np.array(phones) == phone], axis=0)
        if count >= 3 and all((np.abs(place - other) > room).any() for other in taken):
            taken.append(place)
            text = ax.annotate(phone, place, ha="center", va="center", fontsize=6.5, weight="bold")
            text.set_path_effects([withStroke(linewidth=1.8, foreground="white")])


def phones_given_units(units: Path, alignments: Path, num_units: int = 256) -> Figure:
    """Figure 10. P(phone | unit), with units ordered by their most likely phone and phones by frequency.

    Args:
        units: Units at 50 Hz, see :func:`spidr.data.units.read_units`.
        alignments: Alignments, see :func:`spidr.data.alignments.read_alignments`.
        num_units: Size of the codebook.
    """
    data = aligned_units(units, alignments)
    probabilities, phones, order = proba_phone_code(data, num_units=num_units, num_phones=100, only_active=True)
    figure, (ax,) = new_figure(4.4)
    image = ax.imshow(probabilities.numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    ax.set(
        xlabel=f"{len(order)} active units of {num_units}, by most likely phone",
        yticks=range(len(phones)),
        yticklabels=phones,
        xticks=range(0, len(order), 50 if len(order) > 100 else 10),
    )
    ax.tick_params(axis="y", labelsize=5.8, length=1.5, pad=1)
    ax.grid(visible=False)
    bar = figure.colorbar(image, ax=ax, location="top", fraction=0.03, aspect=40, pad=0.01)
    bar.set_label("P(phone | unit)")
    bar.outline.set_linewidth(0.4)
    return figure


def aligned_units(units: Path, alignments: Path) -> dict[str, Any]:
    """Phones (100 Hz) and units (50 Hz) of the recordings that have both."""
    sequences = read_units(units)
    phones = read_alignments(alignments)
    matched = match_names(phones, sequences).items()
    data = {name: (phones[found], sequences[name]) for name, found in matched if len(sequences[name])}
    if not data:
        raise InputError(f"{units}: none of the {len(sequences)} recordings is aligned in {alignments}.")
    return data

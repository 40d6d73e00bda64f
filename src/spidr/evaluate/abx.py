"""ABX error rates by fastabx: how often a phone is closer to a different phone than to another of its kind.

Between 0 and 1; lower is better, chance is 0.5. The triplets are those of ZeroSpeech 2021 (arXiv 2011.11588): A and X
are the same phone, B another one, all with the same phones before and after; spoken by one speaker ("within"), or X by
another than A and B ("across").
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from spidr.data.lines import read_lines, split_row
from spidr.data.names import match_names
from spidr.data.units import read_record, read_units
from spidr.tools.errors import InputError, first_line, some
from spidr.tools.files import check_file, expand, find_files
from spidr.tools.lazy import needs_extra
from spidr.tools.tensors import check_plain, read_tensors

COLUMNS = ("#file", "onset", "offset", "#phone", "prev-phone", "next-phone", "speaker")
LARGEST = 1e15  # features larger than this, or all smaller than its inverse, have squares outside float32's range

Distance = Literal["angular", "euclidean", "kl_symmetric", "identical"]


class ABX(NamedTuple):
    """Error rates, and the number of items they are measured on."""

    within: float | None
    """Within speaker; None if no speaker says anything twice."""
    across: float | None
    """Across speakers; None if there is only one."""
    items: int
    """Items that were used."""
    too_short: int
    """Items skipped because they contain no frame."""


@dataclass(frozen=True)
class Items:
    """The phones of an item file: recordings, exact times in seconds, and labels."""

    path: Path
    files: list[str]
    times: list[tuple[Fraction, Fraction]]
    labels: dict[str, list[str]]


def read_items(path: str | Path) -> Items:
    """Read an ABX item file: ``#file onset offset #phone prev-phone next-phone speaker``, then one line per phone.

    Columns are separated by tabs or blanks.

    Raises:
        InputError: The file is missing, or a line is not of this form.
    """
    path, header, rows = expand(path), list[str](), []
    for number, line in read_lines(path):
        if not header:
            header = line.split()
            if missing := [name for name in COLUMNS if name not in header]:
                raise InputError(f"{path}: no item file: the first line lacks {', '.join(missing)}.")
            continue
        row, found = split_row(header, line), f"found {line[:80]!r}"
        try:
            onset, offset = _seconds(row["onset"]), _seconds(row["offset"])
        except (KeyError, ValueError):
            raise InputError(f"{path}: line {number}: expected {' '.join(header)}; {found}.") from None
        if onset < Fraction(-1, 10):  # aligners place some slightly before the recording
            raise InputError(f"{path}: line {number}: the onset is before the recording; {found}.")
        if onset > offset:
            raise InputError(f"{path}: line {number}: the offset is before the onset; {found}.")
        rows.append((row, (onset, offset)))
    if not rows:
        raise InputError(f"{path}: no item in the file.")
    labels = {name: [row[name] for row, _ in rows] for name in COLUMNS[3:]}
    return Items(path, [row["#file"] for row, _ in rows], [times for _, times in rows], labels)


def _seconds(text: str) -> Fraction:
    """Exact value of a decimal number; Fraction alone would take hours for 1e999999999."""
    if not re.fullmatch(r"[+-]?\d{1,18}(\.\d{0,30})?([eE][+-]?\d{1,2})?", text, re.ASCII):
        raise ValueError
    return Fraction(text)


class Scorer:
    """Scores representations on the same items.

    Frame i is at ``(i + 0.5) / frame_rate`` seconds. The frames within an item, including its ends, are compared by
    dynamic time warping.

    Args:
        items: See :func:`read_items`.
        frame_rate: Frames per second.
        max_size_group: Maximum number of A, B and X in a cell, drawn with a fixed seed (10 in ZeroSpeech); None: all.
        max_x_across: Maximum number of speakers of X for given A and B (5 in ZeroSpeech); None: all.

    Raises:
        InputError: fastabx is not installed.
    """

    def __init__(
        self,
        items: Items,
        *,
        frame_rate: Fraction | int = 50,
        max_size_group: int | None = 10,
        max_x_across: int | None = 5,
    ) -> None:
        with needs_extra("abx", " (Python 3.12 or newer)"):
            import fastabx
        for name, size in (("max_size_group", max_size_group), ("max_x_across", max_x_across)):
            if size is not None and not 2 <= size < 2**31:
                raise InputError(f"{name}: found {size}, expected an integer of at least 2, or all of them")
        self._fastabx: Any = fastabx
        self.items, self.frame_rate = items, Fraction(frame_rate)
        half = Fraction(1, 2)
        # Exact, or rounding would decide about an item that ends in the middle of a frame.
        self._frames = [
            (max(0, math.ceil(onset * frame_rate - half)), max(0, math.floor(offset * frame_rate - half) + 1))
            for onset, offset in items.times
        ]
        self._subsampler = fastabx.Subsampler(max_size_group, max_x_across)
        self._cells: dict[tuple[bytes, str], Any] = {}

    def score(self, features: Mapping[str, NDArray[Any]], distance: Distance = "angular") -> ABX:
        """Compute the error rates of a representation.

        Args:
            features: Name of a recording → its frames: (T, D), or (T,) units for the distance "identical". Names are
                compared as by :func:`spidr.data.names.match_names`.
            distance: Distance of two frames: "angular" for features, "identical" (0 or 1) for units.

        Raises:
            InputError: A recording of the items is missing, shorter than its items, or not finite, or the distance does
                not apply.
        """
        slices, used = self._slices(features)
        shapes = {part.shape[1:] for part in slices}
        if len(shapes) > 1:
            raise InputError(f"the features have different dimensions: {', '.join(sorted(map(str, shapes)))}")
        data = torch.from_numpy(np.concatenate(slices))
        data = _comparable(data.unsqueeze(1) if data.ndim == 1 else data, distance)
        ends = np.cumsum([len(part) for part in slices]).tolist()
        spans = dict(enumerate(pairwise([0, *ends])))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        accessor = self._fastabx.InMemoryAccessor(spans, data, device)
        within, across = (self._rate(accessor, used, distance, speaker) for speaker in ("within", "across"))
        return ABX(within, across, items=int(used.sum()), too_short=int((~used).sum()))

    def _slices(self, features: Mapping[str, NDArray[Any]]) -> tuple[list[NDArray[Any]], NDArray[np.bool_]]:
        """Cut out the frames of each item, and say which items have any."""
        files = self.items.files
        names = match_names(features, set(files))
        if missing := sorted(set(files) - names.keys()):
            of = f"{len(missing)} recordings, such as {some(missing, 3)}"
            raise InputError(f"{self.items.path}: no features of {of}.")
        slices: dict[int, NDArray[Any]] = {}
        # One recording at a time, since each is read when it is looked up.
        for file, rows in groupby(sorted(range(len(self._frames)), key=files.__getitem__), key=files.__getitem__):
            frames = features[names[file]]
            for row in rows:
                start, end = self._frames[row]
                if end > len(frames) + 2:  # convolutions without padding make one frame fewer
                    raise InputError(
                        f"{self.items.path}: an item ends at frame {end} of {file}, which has {len(frames)} frames; is "
                        "the frame rate right?"
                    )
                if start < min(end, len(frames)):
                    slices[row] = np.array(frames[start:end])
        if not slices:
            raise InputError(f"{self.items.path}: no frame lies within any item; is the frame rate right?")
        used = np.isin(np.arange(len(files)), list(slices))
        return [slices[row] for row in sorted(slices)], used

    def _rate(
        self, accessor: Any, used: NDArray[np.bool_], distance: Distance, speaker: Literal["within", "across"]
    ) -> float | None:
        import polars as pl

        labels = pl.DataFrame(self.items.labels).filter(pl.Series(used))
        dataset, key = self._fastabx.Dataset(labels, accessor), (used.tobytes(), speaker)
        if key not in self._cells:
            context = ["prev-phone", "next-phone"]
            groups = {"by": [*context, "speaker"]} if speaker == "within" else {"by": context, "across": ["speaker"]}
            try:
                task = self._fastabx.Task(dataset, on="#phone", subsampler=self._subsampler, **groups)
                self._cells[key] = task.cells
            except self._fastabx.EmptyTaskError:
                self._cells[key] = None
        cells = self._cells[key]
        if cells is None:
            return None
        task = self._fastabx.Task.from_cells(dataset, cells, is_symmetric=speaker == "within")
        score = self._fastabx.Score(task, distance, progress=False)
        rate = float(score.collapse(levels=[("next-phone", "prev-phone"), "speaker"]))
        if not 0 <= rate <= 1:
            raise InputError(f"the distance {distance!r} between frames of these features is not a number")
        return rate


def _comparable(data: torch.Tensor, distance: Distance) -> torch.Tensor:
    """Check that a distance between frames (T, D) exists, and scale them to make it exact enough in float32."""
    if distance not in get_args(Distance):
        raise InputError(f"distance: found {distance!r}, expected one of {', '.join(get_args(Distance))}")
    if distance == "identical":
        if data.shape[1] != 1:
            raise InputError(f"the distance 'identical' is for units; the features have {data.shape[1]} dimensions")
        return data
    if not data.is_floating_point() and data.shape[1] == 1:
        raise InputError(f"the distance {distance!r} is for features; these are units, whose distance is 'identical'")
    data = data if data.dtype == torch.float64 else data.float()
    if not data.isfinite().all():
        raise InputError("the features hold values that are not finite")
    if distance == "angular":
        largest = data.abs().amax(1, keepdim=True)
        if not largest.all():
            raise InputError("the features hold frames of zeros, which have no angle")
        if largest.max() > LARGEST or largest.min() < 1 / LARGEST:
            data = data / largest
    elif distance == "kl_symmetric":
        if (data < 0).any() or ((data.sum(1) - 1).abs() > 1e-3).any():
            raise InputError(
                "the distance 'kl_symmetric' is for distributions: frames of values from 0 on that sum to 1"
            )
    elif data.abs().max() > LARGEST:
        raise InputError(f"the features hold values above {LARGEST:g}, of which float32 cannot hold the squares")
    return data.float()


class FeatureFolder(Mapping[str, NDArray[Any]]):
    """The features of a folder: one ``.npy`` or ``.pt`` file per recording, at any depth, (T, D), or units (T,)."""

    def __init__(self, folder: Path) -> None:
        files = [Path(file) for file in find_files(folder, lambda name: name.endswith((".npy", ".pt")))]
        self._files = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
        if not files:
            raise InputError(f"{folder}: no .npy or .pt file in the folder")
        if len(self._files) < len(files):
            raise InputError(f"{folder}: a recording is there both as .npy and as .pt")

    def __getitem__(self, name: str) -> NDArray[Any]:
        path = self._files[name]
        try:
            check_file(path)
            if path.suffix == ".npy":
                features: NDArray[Any] = np.load(path, mmap_mode="r")
            else:
                features = check_plain(read_tensors(path), "the top").float().numpy()
            kind = features.dtype.kind
        except Exception as error:  # a damaged file can fail in any way
            raise InputError(f"{path}: no features of a recording ({first_line(error)})") from None
        if kind not in "fiu":
            raise InputError(f"{path}: features must be real numbers, not {features.dtype}")
        if features.ndim != 2 and not (features.ndim == 1 and kind in "iu"):
            raise InputError(f"{path}: features must be (frames, dimensions), not of shape {features.shape}")
        return features

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def evaluate_abx(source: str | Path, scorer: Scorer, distance: Distance | None = None) -> ABX:
    """Compute the ABX error rates of a folder of features or a file of units.

    Args:
        source: A folder (see :class:`FeatureFolder`), or units (see :func:`spidr.data.units.read_units`).
        scorer: The task.
        distance: Between frames; None: "angular" for features, "identical" for units.

    Raises:
        InputError: The frame rate is not the one recorded by ``spidr.extract``; or see :meth:`Scorer.score`.
    """
    path = expand(source)
    seconds = read_record(path).get("frame_seconds")
    if isinstance(seconds, float) and seconds > 0 and not math.isclose(seconds * scorer.frame_rate, 1, rel_tol=1e-6):
        raise InputError(
            f"{path}: has {1 / seconds:.10g} frames per second, not {float(scorer.frame_rate):.10g}: --frame-rate"
        )
    is_folder = os.path.isdir(path)  # noqa: PTH112 (False for all that cannot be a folder)
    features: Mapping[str, NDArray[Any]] = FeatureFolder(path) if is_folder else read_units(path)
    if distance is None:
        of_units = not is_folder or next(iter(features.values())).ndim == 1
        distance = "identical" if of_units else "angular"
    return scorer.score(features, distance)

"""Phone alignments: which phone is spoken when.

JSON lines, and Praat's TextGrids through praatio, imported here only.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from spidr.data.json_lines import read_lines
from spidr.tools.errors import InputError, first_line
from spidr.tools.lazy import needs_extra
from spidr.tools.untrusted import check_memory, parse_json

if TYPE_CHECKING:
    from collections.abc import Iterable

FRAME_STEP = 10
"""Milliseconds per frame of an alignment."""

MAX_SECONDS = 86_400.0
"""No recording is longer than a day: an alignment that is would take any amount of memory."""

SILENCE = "SIL"
SILENT_LABELS = {"", "sil", "sp"}
"""How TextGrids name silence, in lower case."""

Alignments = dict[str, list[str]]
"""Name of a recording → its phones, one per frame of 10 ms."""


def read_alignments(path: str | Path, tier: str | None = None) -> Alignments:
    """Read phone alignments.

    Args:
        path: JSON lines (also gzipped, ``.gz``), a Praat ``.TextGrid``, or a folder of them, at any depth. A line has
            the recording's ``fileid`` (or ``name``) and ``phones``: either one phone per frame of 10 ms, or
            ``[phone, start, end]`` in seconds, in order, and then perhaps the ``duration``. A TextGrid is named as its
            recording, and its empty intervals, "sil" and "sp" are silence.
        tier: The tier of TextGrids that holds the phones. None: the one named "phones" or "phone", with or without a
            speaker's name before it, else the only tier of intervals.

    Returns:
        For each recording, the phone in the middle of each frame of 10 ms: frame i is at ``(i + 0.5) * 10`` ms, and
        there are as many as fit into the duration. "SIL" where there is none.

    Raises:
        InputError: The file is missing, a line is not of this form, a TextGrid has no such tier, or a recording occurs
            twice.
    """
    path = Path(path)
    try:
        if os.path.isdir(path):  # noqa: PTH112 (False for all that cannot be a folder)
            alignments = _read_folder(path, tier)
        elif path.suffix.lower() == ".textgrid":
            alignments = {path.stem: _read_grid(path, tier)}
        else:
            alignments = _read_lines(path)
    except OSError as error:
        raise InputError(f"{path}: the alignments cannot be read ({error.strerror or error}).") from None
    if not alignments:
        what = "no .TextGrid in the folder" if os.path.isdir(path) else "no alignment in the file"  # noqa: PTH112
        raise InputError(f"{path}: {what}.")
    return alignments


def _read_folder(folder: Path, tier: str | None) -> Alignments:
    alignments: Alignments = {}
    for file in sorted(file for file in folder.rglob("*") if file.suffix.lower() == ".textgrid"):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in alignments:
            raise InputError(f"{file}: {name!r} is aligned twice.")
        alignments[name] = _read_grid(file, tier)
    return alignments


def _read_lines(path: Path) -> Alignments:
    alignments: Alignments = {}
    frames = 0
    for number, line in read_lines(path):
        try:
            name, phones = _parse(parse_json(line))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(
                f"{path}: line {number}: expected a JSON object with `fileid` and `phones`, one per 10 ms or "
                f"[phone, start, end] in seconds; found {line[:80]!r}."
            ) from None
        if name in alignments:
            raise InputError(f"{path}: line {number}: {name!r} is aligned twice.")
        frames += len(phones)
        check_memory(8 * frames, f"{path}: line {number}: all alignments up to here")
        alignments[name] = phones
    return alignments


def _read_grid(path: Path, tier: str | None) -> list[str]:
    with needs_extra("train"):
        from praatio import textgrid
    try:
        grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=True)
    except OSError:
        raise
    except Exception as error:  # a parser without an error of its own
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{path}: not a TextGrid that praatio can read ({reason}).") from None
    tiers = [name for name in grid.tierNames if isinstance(grid.getTier(name), textgrid.IntervalTier)]
    chosen = [name for name in tiers if name == tier] if tier is not None else _phone_tiers(tiers)
    if len(chosen) != 1:
        wanted = f"no tier {tier!r}" if tier is not None else "cannot tell the tier of the phones"
        raise InputError(f"{path}: {wanted}; tiers of intervals found: {', '.join(tiers) or 'none'}.")
    entries = grid.getTier(chosen[0]).entries
    intervals = [
        (SILENCE if label.strip().lower() in SILENT_LABELS else label.strip(), float(start), float(end))
        for start, end, label in entries
    ]
    try:
        return _frames(intervals, float(grid.maxTimestamp))
    except ValueError:
        raise InputError(f"{path}: the intervals of tier {chosen[0]!r} overlap, or last longer than a day.") from None


def _phone_tiers(names: list[str]) -> list[str]:
    named = [name for name in names if name.split("-")[-1].strip().lower() in ("phones", "phone")]
    return named or (names if len(names) == 1 else [])


def match_alignments(alignments: Alignments, fileids: Iterable[str]) -> Alignments:
    """The alignment of each recording that has one, see :func:`match_names`."""
    return {fileid: alignments[name] for fileid, name in match_names(alignments, fileids).items()}


def match_names(names: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """What each wanted recording is called among ``names``, as far as it is there.

    That is the same name, else the one whose name without folders and extension is the recording's.

    Raises:
        InputError: Several could be meant.
    """
    exact = set(names)
    by_stem: dict[str, list[str]] = {}
    for name in exact:
        by_stem.setdefault(PurePath(name).stem, []).append(name)
    matched = {}
    for fileid in wanted:
        found = [fileid] if fileid in exact else by_stem.get(PurePath(fileid).stem, [])
        if len(found) > 1:
            raise InputError(f"{fileid}: several recordings could be meant: {', '.join(sorted(found)[:3])}.")
        if found:
            matched[fileid] = found[0]
    return matched


def _parse(row: dict[str, Any]) -> tuple[str, list[str]]:
    name = row["fileid"] if "fileid" in row else row["name"]
    phones = row["phones"]
    if not isinstance(name, str) or not isinstance(phones, list) or not phones:
        raise TypeError
    if all(isinstance(phone, str) for phone in phones):
        return name, list(map(sys.intern, phones))  # 8 bytes for each frame instead of 60
    intervals = [(sys.intern(phone), float(start), float(end)) for phone, start, end in phones]
    return name, _frames(intervals, float(row.get("duration", intervals[-1][2])))


def _frames(intervals: list[tuple[str, float, float]], duration: float) -> list[str]:
    """Phone at the middle of each frame.

    Raises:
        ValueError: The intervals overlap, or there are none that long.
    """
    if not (0 <= duration <= MAX_SECONDS and math.isfinite(duration)):
        raise ValueError
    # Rounded a little first, or 0.29 s would be 28.999… frames.
    frames = [SILENCE] * int(round(duration * 1000 / FRAME_STEP, 6))
    before = 0.0
    for phone, start, end in intervals:
        if not before <= start <= end <= MAX_SECONDS:
            raise ValueError
        before = end
        first, last = (max(0, -int(-(round(time * 1000 / FRAME_STEP - 0.5, 6)) // 1)) for time in (start, end))
        frames[first:last] = [phone] * len(frames[first:last])
    return frames

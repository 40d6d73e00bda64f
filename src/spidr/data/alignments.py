"""Phone alignments: which phone is spoken when."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from spidr.config import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

FRAME_STEP = 10
"""Milliseconds per frame of an alignment."""


def read_alignments(path: str | Path) -> dict[str, list[str]]:
    """Read phone alignments.

    Args:
        path: JSON lines. Each has the recording's ``fileid`` (or ``name``) and ``phones``: either one phone per frame
            of 10 ms, or ``[phone, start, end]`` in seconds, in order, and then perhaps the ``duration``.

    Returns:
        For each recording, the phone in the middle of each frame of 10 ms: frame i is at ``(i + 0.5) * 10`` ms, and
        there are as many as fit into the duration. "SIL" where there is none.

    Raises:
        InputError: The file is missing, a line is not of this form, or a recording occurs twice.
    """
    path = Path(path)
    alignments: dict[str, list[str]] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    name, phones = _parse(json.loads(line))
                except (ValueError, TypeError, KeyError, AttributeError):
                    raise InputError(
                        f"{path}: line {number}: expected a JSON object with `fileid` and `phones`, one per 10 ms or "
                        f"[phone, start, end] in seconds; found {line.strip()[:80]!r}."
                    ) from None
                if name in alignments:
                    raise InputError(f"{path}: line {number}: {name!r} is aligned twice.")
                alignments[name] = phones
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file ({error}).") from None
    except OSError as error:
        raise InputError(f"{path}: the alignments cannot be read ({error.strerror}).") from None
    if not alignments:
        raise InputError(f"{path}: no alignment in the file.")
    return alignments


def match_alignments(alignments: dict[str, list[str]], fileids: Iterable[str]) -> dict[str, list[str]]:
    """The alignment of each recording that has one.

    A recording's alignment is the one of the same name, else the one whose name without folders and extension is the
    recording's.

    Raises:
        InputError: Several alignments could be meant.
    """
    by_stem: dict[str, list[str]] = {}
    for name in alignments:
        by_stem.setdefault(PurePath(name).stem, []).append(name)
    matched = {}
    for fileid in fileids:
        names = [fileid] if fileid in alignments else by_stem.get(PurePath(fileid).stem, [])
        if len(names) > 1:
            raise InputError(f"{fileid}: several alignments could be meant: {', '.join(sorted(names)[:3])}.")
        if names:
            matched[fileid] = alignments[names[0]]
    return matched


def _parse(row: dict[str, Any]) -> tuple[str, list[str]]:
    name = row["fileid"] if "fileid" in row else row["name"]
    phones = row["phones"]
    if not isinstance(name, str) or not isinstance(phones, list) or not phones:
        raise TypeError
    if all(isinstance(phone, str) for phone in phones):
        return name, phones
    intervals = [(str(phone), float(start), float(end)) for phone, start, end in phones]
    return name, _frames(intervals, float(row.get("duration", intervals[-1][2])))


def _frames(intervals: list[tuple[str, float, float]], duration: float) -> list[str]:
    """Phone at the middle of each frame."""
    # Rounded a little first, or 0.29 s would be 28.999… frames.
    frames = ["SIL"] * int(round(duration * 1000 / FRAME_STEP, 6))
    before = 0.0
    for phone, start, end in intervals:
        if not before <= start <= end:
            raise ValueError
        before = end
        first, last = (max(0, -int(-(round(time * 1000 / FRAME_STEP - 0.5, 6)) // 1)) for time in (start, end))
        frames[first:last] = [phone] * len(frames[first:last])
    return frames

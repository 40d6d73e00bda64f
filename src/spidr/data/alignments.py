"""Read phone alignments: JSON lines, tables and Praat TextGrids."""

import codecs
import os
import re
from collections.abc import Callable, Collection, Iterator
from functools import cache, partial
from math import ceil
from pathlib import Path
from typing import Any

from spidr.data.lines import read_lines, split_row
from spidr.tools.errors import InputError, first_line, some
from spidr.tools.files import check_file, expand, find_files
from spidr.tools.lazy import needs_extra
from spidr.tools.untrusted import check_memory, parse_json

FRAME_STEP = 10  # milliseconds per frame of an alignment
MAX_SECONDS = 86_400.0  # longest alignment, one day; otherwise a short file could ask for any amount of memory
TOLERANCE = 100  # milliseconds by which an alignment may differ in length from the units
ROUNDING = 1e-3  # tolerated rounding error of times, in seconds

SILENCE = "SIL"
_NAMES = "sil sp spn pau silence <sil> <sp> <spn> <pau> <eps> <p:> h# #h"
SILENT_LABELS = frozenset(["", *_NAMES.split()])  # labels of silence, in lower case

Alignments = dict[str, list[str]]
"""Name of a recording → its phones, one per frame of 10 ms."""

Skipped = dict[str, str]
"""What was skipped, and why."""

Interval = tuple[str, float, float]  # a phone with its start and end in seconds


def read_alignments(
    path: str | Path,
    tier: str | None = None,
    *,
    silence: Collection[str] = SILENT_LABELS,
    skipped: Skipped | None = None,
) -> Alignments:
    """Read phone alignments.

    Args:
        path: JSON lines (also gzipped, ``.gz``), DiscoPhon's table (``#file onset offset #phone``, in seconds), a Praat
            ``.TextGrid``, or a folder of TextGrids, at any depth. A line of JSON has the recording's ``fileid`` (or
            ``name``) and ``phones``: either one phone per frame of 10 ms, or ``[phone, start, end]`` in seconds, in
            order, and optionally the ``duration``. A TextGrid has the name of its recording. Times that contradict each
            other by less than 1 ms are rounded.
        tier: The tier of TextGrids that holds the phones. None: the one named "phones" or "phone", with or without a
            speaker's name before it, or the only tier of intervals.
        silence: Labels that mean silence, in any case.
        skipped: Collects lines and TextGrids that cannot be read. None: raise an error instead.

    Returns:
        For each recording, the phone in the middle of each frame of 10 ms: frame i is at ``(i + 0.5) * 10`` ms, and
        there are as many as fit into the duration. It is "SIL" where there is none.

    Raises:
        InputError: The file is missing, a line has another form, a TextGrid lacks the tier, or a name occurs twice.
    """
    path, silent = expand(path), {label.strip().lower() for label in silence}

    @cache  # one string object for all frames of a phone
    def phone(label: str) -> str:
        if not isinstance(label, str):
            raise TypeError
        return SILENCE if label.strip().lower() in silent else label.strip()

    alignments: Alignments = {}
    problems: Skipped = {} if skipped is None else skipped
    frames = 0
    for place, read in _entries(path, tier, phone):
        try:
            name, labels = read()
            frames += len(labels)
            check_memory(8 * frames, "all alignments up to here")
        except InputError as error:
            problems[place] = str(error)
            continue
        if name in alignments:
            raise InputError(f"{place}: {name[:200]!r} is aligned twice")
        alignments[name] = labels
    if skipped is None and problems:
        raise InputError(some([f"{place}: {problem}" for place, problem in problems.items()], separator="\n"))
    if not alignments:
        what = ".TextGrid in the folder" if os.path.isdir(path) else "alignment in the file"  # noqa: PTH112
        raise InputError(f"{path}: no {what}.")
    return alignments


def _entries(
    path: Path, tier: str | None, phone: Callable[[str], str]
) -> Iterator[tuple[str, Callable[[], tuple[str, list[str]]]]]:
    """Yield the place of each alignment, for messages, and a function that reads its name and phones."""
    is_folder = os.path.isdir(path)  # noqa: PTH112 (False for all that cannot be a folder)
    if is_folder or path.suffix.lower() == ".textgrid":
        with needs_extra("train"):
            from praatio.utilities import textgrid_io
        if not is_folder:
            check_file(path)
        files = find_files(path, lambda name: name.lower().endswith(".textgrid")) if is_folder else [str(path)]
        for file in files:
            name = Path(file).relative_to(path if is_folder else path.parent).with_suffix("").as_posix()
            yield file, partial(_read_grid, Path(file), name, tier, phone, textgrid_io.parseTextgridStr)
        return
    header: list[str] = []
    table: dict[str, list[Interval]] = {}
    for number, line in read_lines(path):
        place = f"{path}: line {number}"
        if header:
            row = split_row(header, line)
            try:
                interval = (phone(row["#phone"]), float(row["onset"]), float(row["offset"]))
                table.setdefault(row["#file"], []).append(interval)
            except (KeyError, ValueError):
                raise InputError(f"{place}: expected #file onset offset #phone; found {line[:80]!r}.") from None
        elif line.startswith("#file"):
            header = line.split()
        else:
            yield place, partial(_read_line, line, phone)
    for name, intervals in table.items():
        yield f"{path}: {name}", partial(_read_table, name, sorted(intervals, key=lambda interval: interval[1:]))


def _read_table(name: str, intervals: list[Interval]) -> tuple[str, list[str]]:
    return name, _frames(intervals)


def _read_line(line: str, phone: Callable[[str], str]) -> tuple[str, list[str]]:
    try:
        row = parse_json(line)
        name, labels = row["fileid"] if "fileid" in row else row["name"], row["phones"]
        if not isinstance(name, str) or not isinstance(labels, list) or not labels:
            raise TypeError
        if all(isinstance(label, str) for label in labels):
            return name, list(map(phone, labels))
        intervals = [(phone(label), float(start), float(end)) for label, start, end in labels]
        duration = float(row.get("duration", 0))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(
            "expected a JSON object with `fileid` and `phones`, one per 10 ms or [phone, start, end] in seconds; "
            f"found {line[:80]!r}."
        ) from None
    return name, _frames(intervals, duration)


_EXPONENT = re.compile(r"^(.*?=\s*|\s*)([-+]?\d*\.?\d+[eE][-+]?\d+)(\s*)$", re.MULTILINE)


def _read_grid(
    path: Path, recording: str, tier: str | None, phone: Callable[[str], str], parse: Callable[[str, bool], Any]
) -> tuple[str, list[str]]:
    check_file(path)
    try:
        content = path.read_bytes()
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if utf16 else "utf-8-sig").replace("\r\n", "\n")
        # praatio cannot read exponents.
        text = _EXPONENT.sub(lambda match: f"{match[1]}{float(match[2]):.12f}{match[3]}", text)
        grid = parse(text, True)
        tiers = [(t["name"], t["entries"]) for t in grid["tiers"] if t["class"] == "IntervalTier"]
    except OSError as error:
        raise InputError(f"the alignments cannot be read ({error.strerror or error}).") from None
    except Exception as error:  # the parser may raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"not a TextGrid that praatio can read ({reason}).") from None
    names = [name for name, _ in tiers]
    named = [name for name in names if name.split("-")[-1].strip().lower() in ("phones", "phone")]
    chosen = [name for name in names if name == tier] if tier is not None else named or names
    if len(chosen) != 1:
        count = "several tiers" if chosen else "no tier"
        wanted = f"{count} {tier!r}" if tier is not None else "cannot tell the tier of the phones"
        raise InputError(f"{wanted}; tiers of intervals found: {', '.join(names) or 'none'}.")
    try:
        intervals = [(phone(label), float(start), float(end)) for start, end, label in dict(tiers)[chosen[0]]]
        return recording, _frames(intervals, float(grid["xmax"]))
    except ValueError as error:
        message = error if isinstance(error, InputError) else f"not a number ({first_line(error)})"
        raise InputError(f"tier {chosen[0]!r}: {message}") from None


def fit(phones: list[str], frames: int, tolerance: int = TOLERANCE) -> list[str] | None:
    """Pad phones, one per frame of 10 ms, with silence, or cut them, to a number of frames.

    None if that takes more than ``tolerance`` milliseconds. A difference of two frames is left alone: as in the
    paper, the end of the longer one does not count.
    """
    short = frames - len(phones)
    if abs(short) <= 2:
        return phones
    if abs(short) * FRAME_STEP > tolerance:
        return None
    return [*phones, *[SILENCE] * short] if short > 0 else phones[:short]


def _frames(intervals: list[Interval], duration: float = 0.0) -> list[str]:
    """Take the phone at the middle of each frame, at least to the end of the last interval."""
    end = max((end for *_, end in intervals[-1:]), default=0.0)
    duration = end if end > duration + ROUNDING else duration
    if not 0 <= duration <= MAX_SECONDS:
        raise InputError(f"a duration of {duration:g} s, not from 0 to {MAX_SECONDS:g}.")
    # Rounded first, otherwise 0.29 s would be 28.999… frames.
    frames = [SILENCE] * int(round(duration * 1000 / FRAME_STEP, 6))
    before = 0.0
    for number, (phone, start, end) in enumerate(intervals, start=1):
        where = f"interval {number}, {phone!r} from {start:g} to {end:g} s"
        if not start >= before - ROUNDING:
            raise InputError(f"{where}: begins before {before:g} s, where the previous one ends.")
        if not end >= start - ROUNDING:
            raise InputError(f"{where}: ends before it begins.")
        if not end <= MAX_SECONDS:
            raise InputError(f"{where}: ends after more than a day.")
        start = max(start, before)
        before = max(end, start)
        first, last = (max(0, ceil(round(time * 1000 / FRAME_STEP - 0.5, 6))) for time in (start, before))
        frames[first:last] = [phone] * len(frames[first:last])
    return frames

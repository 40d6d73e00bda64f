"""The formats in which other programs write units, one line per recording."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from spidr.tools.errors import InputError

UnitFormat = Literal["spidr", "discophon", "slamkit", "unit-hifigan", "fairseq", "km"]

LANGUAGES = ("deu", "swa", "tam", "tha", "tur", "ukr", "cmn", "eng", "eus", "fra", "jpn", "wol")
SPLITS = ("dev", "test", "train-10min", "train-1h", "train-10h")


@dataclass(frozen=True)
class Row:
    """A recording's units, one per frame, and further values that some formats write."""

    name: str
    units: list[int]
    audio: str = ""
    speaker: str = ""

    def runs(self) -> tuple[list[int], list[int]]:
        """Units with repeats merged, and the number of frames of each."""
        runs = [(unit, sum(1 for _ in run)) for unit, run in groupby(self.units)]
        return [unit for unit, _ in runs], [count for _, count in runs]


class Format(NamedTuple):
    """A format for units."""

    line: Callable[[Row, bool], str]  # a row as text, with repeats merged or not
    parse: Callable[[str], tuple[str | None, list[int], list[int] | None]]  # a row's name, units and durations
    suffix: str = ".jsonl"  # suffixes of its files' names
    has_names: bool = True  # whether lines name their recording


def _json_format(name_key: str, units_key: str, durations_key: str, *, always_merged: bool = False) -> Format:
    def line(row: Row, merge: bool) -> str:
        fields: dict[str, Any] = {name_key: row.audio if name_key == "audio" else row.name, units_key: row.units}
        if merge or always_merged:
            fields[units_key], fields[durations_key] = row.runs()
        if name_key == "audio":
            fields["speaker"] = row.speaker
        return json.dumps(fields)

    def parse(text: str) -> tuple[str | None, list[int], list[int] | None]:
        fields = json.loads(text)
        name = fields[name_key]
        if not isinstance(name, str):
            raise TypeError
        return None if name_key == "audio" else name, fields[units_key], fields.get(durations_key)

    return Format(line, parse, has_names=name_key != "audio")


def _integers(row: Row, merge: bool) -> str:
    return " ".join(map(str, row.runs()[0] if merge else row.units))


def _parse_fairseq(text: str) -> tuple[str | None, list[int], list[int] | None]:
    name, bar, units = text.rpartition("|")
    if not bar:
        raise ValueError
    return name, _parse_integers(units), None


def _parse_integers(text: str) -> list[int]:
    return [int(unit) for unit in text.split()]


FORMATS: dict[str, Format] = {
    "spidr": _json_format("fileid", "units", "durations"),
    "discophon": _json_format("file", "units", "durations"),
    "slamkit": _json_format("file_name", "units", "duration", always_merged=True),
    "unit-hifigan": _json_format("audio", "units", "durations"),
    "fairseq": Format(lambda row, merge: f"{row.name}|{_integers(row, merge)}", _parse_fairseq, ".txt"),
    "km": Format(_integers, lambda text: (None, _parse_integers(text), None), ".km", has_names=False),
}


def output_file(output: Path, file_format: UnitFormat, language: str | None, split: str | None) -> Path:
    """The file to write: the output itself, or DiscoPhon's file for a language and split in that folder.

    Raises:
        InputError: The name of the file, the language or the split does not fit.
    """
    if language is not None or split is not None:
        for name, value, known in (("language", language, LANGUAGES), ("split", split, SPLITS)):
            if file_format != "discophon":
                raise InputError(f"{name}: only the format discophon names its files by language and split")
            if value not in known:
                raise InputError(f"{name}: found {value!r}, expected one of {', '.join(known)}")
        return output / f"units-{language}-{split}.jsonl"
    suffixes = (".jsonl", ".parquet") if file_format == "spidr" else (FORMATS[file_format].suffix,)
    if output.suffix not in suffixes:
        remedy = ", or be a folder with --language and --split" if file_format == "discophon" else ""
        raise InputError(f"{output}: the name of such a file of units must end in {' or '.join(suffixes)}{remedy}.")
    return output

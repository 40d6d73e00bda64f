"""Metrics of a run in ``metrics.jsonl``, the source of truth.

A line is a flat JSON object with ``step``, ``group`` ("train" or the name of a validation set) and values.
"""

import json
import logging
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from spidr.tools.errors import InputError
from spidr.tools.files import atomic_write, writing
from spidr.tools.untrusted import parse_json

logger = logging.getLogger(__name__)

Line = dict[str, Any]


def read_metrics(path: Path) -> list[Line]:
    """Read the complete lines of a metrics file; anything else, such as half a line, is skipped.

    Raises:
        InputError: The file exists but cannot be read.
    """
    lines = []
    try:
        for text in path.read_bytes().splitlines():
            with suppress(ValueError):
                line = parse_json(text.decode())
                if _is_line(line):
                    lines.append(line)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return lines


def _is_line(line: Any) -> bool:
    if not isinstance(line, dict) or not isinstance(line.get("step"), int) or not isinstance(line.get("group"), str):
        return False
    return all(isinstance(value, int | float | None) for key, value in line.items() if key != "group")


class MetricsFile:
    """Appends lines to ``metrics.jsonl``, each once.

    Lines after ``step``, from which the run resumes, and the line of step and group ``again`` are removed: they will be
    rewritten.
    """

    def __init__(self, path: Path, step: int, again: tuple[int, str] | None = None) -> None:
        self.path = path
        lines = read_metrics(path)
        kept = [line for line in lines if line["step"] <= step and (line["step"], line["group"]) != again]
        self._written = {(line["step"], line["group"]) for line in kept}
        if path.exists():
            with atomic_write(path) as file:
                file.writelines(_to_text(line).encode() for line in kept)

    def __contains__(self, key: tuple[int, str]) -> bool:
        return key in self._written

    def write(self, line: Line) -> bool:
        """Append a line. Returns False if its step and group exist. Raises InputError if the disk is full."""
        key = (line["step"], line["group"])
        if key in self._written:
            return False
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_to_text(line))
            file.flush()
            os.fsync(file.fileno())
        self._written.add(key)
        return True


def _to_text(line: Line) -> str:
    # NaN is not JSON; a missing value (such as the perplexity of nothing) is null.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(finite) + "\n"

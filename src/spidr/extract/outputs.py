"""What both kinds of outputs have in common: records of how and of what they were made, an end all processes reach."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

import spidr
from spidr.environment import Environment
from spidr.extract.encoder import Skipped
from spidr.extract.sources import Item
from spidr.tools.errors import InputError
from spidr.tools.files import atomic_write, make_folder
from spidr.tools.untrusted import parse_json

logger = logging.getLogger(__name__)

INFORMATIVE = ("skipped",)
"""What a record says beside the settings."""


def record(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """How outputs were made, as JSON would give it back."""
    return json.loads(json.dumps({"kind": kind, "spidr": spidr.__version__, **settings}))


def check_record(path: Path, expected: dict[str, Any]) -> None:
    """Check that outputs were made in the same way.

    Raises:
        InputError: They were not, or the record cannot be read.
    """
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: says how the outputs were made, but cannot be read ({error}).") from None
    for key in [*expected, *(key for key in found if key not in expected and key not in INFORMATIVE)]:
        if found.get(key) != expected.get(key):
            raise InputError(
                f"{path}: the outputs there were made with {key} = {json.dumps(found.get(key))}, now it is "
                f"{json.dumps(expected.get(key))}. Choose another output, or remove that one."
            )


def write_record(path: Path, content: dict[str, Any], skipped: Skipped | None = None) -> None:
    """Write how outputs were made, complete or not at all."""
    make_folder(path.parent)
    with atomic_write(path) as file:
        file.write(json.dumps(content | ({"skipped": skipped} if skipped else {}), indent=2).encode() + b"\n")


def place_of(item: Item) -> str:
    """Where a recording is, wherever the command is run."""
    place = item.recording
    full = os.path.abspath(place.archive or place.path)  # noqa: PTH100
    return full if place.archive is None else f"{full}:{place.path}"


def check_recordings(path: Path, items: Sequence[Item], done: Collection[str]) -> dict[str, str]:
    """Check that what is done was made of these recordings, and write down which recording each name is.

    Without that, a name that now is another recording's would silently get the output of the earlier one.

    Args:
        path: The file that says so, JSON. Outputs of earlier versions have none: then all of it is taken to be right.
        items: The recordings.
        done: The names of what there is.

    Returns:
        The recording of each name, also of those that are done and not among ``items``.

    Raises:
        InputError: A name that is done was another recording, or the file cannot be read or written.
    """
    known: dict[str, str] = {}
    if os.path.exists(path):  # noqa: PTH110
        try:
            known = parse_json(path.read_text(encoding="utf-8"))
            if not isinstance(known, dict) or not all(isinstance(place, str) for place in known.values()):
                raise ValueError("it is no JSON object of strings")
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: says of which recordings the outputs are, but cannot be read ({error}). Choose another "
                "output; if the recordings are the same, remove that file."
            ) from None
    now = {item.name: place_of(item) for item in items}
    for name, place in now.items():
        if name in done and known.get(name, place) != place:
            raise InputError(
                f"{path}: the output of {name} there is that of {known[name]}, now the name is that of {place}. Choose "
                "another output; if the recordings have only been moved, remove that file."
            )
    if (both := known | now) != known:
        make_folder(path.parent)
        with atomic_write(path) as file:
            file.write(json.dumps(both, indent=0).encode() + b"\n")
    return both


def gather_skipped(env: Environment, skipped: Skipped) -> Skipped:
    """Those of all processes. Waits for the slowest, however long it takes."""
    parts: list[Any] = [skipped]
    if env.world_size > 1:
        parts *= env.world_size
        group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=100))
        dist.all_gather_object(parts, skipped, group=group)
    return Skipped({name: reason for part in parts for name, reason in sorted(part.items())})


def report(skipped: Skipped, total: int, env: Environment) -> None:
    """Say how many recordings were left out."""
    if skipped and env.is_main:
        logger.warning("%d of %d recordings were skipped", len(skipped), total)


def names_of(sources: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """One source or several, as a list."""
    return [sources] if isinstance(sources, (str, Path)) else list(sources)

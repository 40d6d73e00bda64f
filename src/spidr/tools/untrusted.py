"""Read untrusted input: tables of settings, JSON, and the sizes they ask for."""

import json
import os
import sys
import tomllib
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from spidr.tools.errors import InputError
from spidr.tools.files import check_file
from spidr.tools.schema import show, show_key


def check_memory(size: int, place: str) -> None:
    """Refuse a request for more than half of the memory, as a few bytes of a file may ask for any amount.

    Raises InputError, which names ``place``, if ``size`` bytes are too many.
    """
    if size > _memory() // 2:
        raise InputError(f"{place}: would take {size / 2**30:,.1f} GiB, more than half of the memory there is.")


@cache
def _memory() -> int:
    try:
        import resource
    except ImportError:  # on Windows
        return sys.maxsize
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        sizes.append(limit)
    with suppress(OSError, ValueError):  # ValueError: "max"
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text("utf-8")))
    return min(sizes)


_MAX_BYTES = 2**20


def read_table(path: str | Path) -> dict[str, Any]:
    """Parse a TOML file, or a JSON file if its name ends in ``.json``.

    Raises:
        InputError: The file is missing, unreadable, not UTF-8, not valid, or names a key twice.
    """
    path = Path(path)
    kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
    check_file(path)
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > _MAX_BYTES:
        raise InputError(f"{path}: larger than {_MAX_BYTES // 2**20} MiB, so no configuration")
    try:
        text = raw.decode("utf-8-sig")
        document = parse_json(text) if kind == "JSON" else _parse_toml(text)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: not UTF-8 text (line {line}: byte 0x{raw[error.start]:02x})") from None
    except ValueError as error:  # including the parsers' own errors, which name the line
        raise InputError(f"{path}: not valid {kind}: {error}") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: found {show(document)}, accepted: an object of sections")
    return document


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError if it is not valid, names a key twice, or is nested too deeply."""

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"duplicate key {show_key(key)}")
            result[key] = value
        return result

    try:
        return json.loads(text, object_pairs_hook=table)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML, with the errors of :func:`parse_json`."""
    for number, line in enumerate(text.split("\n"), start=1):
        # tomllib takes quadratic time in the number of a key's parts.
        if line.partition("=")[0].count(".") > 100 and not line.lstrip().startswith("#"):
            raise ValueError(f"nested too deeply (at line {number})")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_toml_value(text: str) -> Any:
    """Parse a TOML value (a number, true, a list); anything else is a string."""
    try:
        table = _parse_toml(f"value = {text}")
    except ValueError:
        return text
    return table["value"] if table.keys() == {"value"} else text

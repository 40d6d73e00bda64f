"""Coverage-guided fuzzing: inputs that reach new lines of the readers are kept and mutated further, for hours.

Run by hand, in an environment with atheris, the package and its extra "test"; arguments after the target's name go to
libFuzzer:

    python tests/whole/fuzz_atheris.py manifest -max_total_time=600
    python tests/whole/fuzz_atheris.py manifest crash-…      # repeat a finding

Only an InputError may leave a reader, and what it reads must pass the checks of ``test_fuzz.py``.
"""

from __future__ import annotations

import gzip
import io
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import atheris

os.environ["TMPDIR"] = tempfile.tempdir = "/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()
sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' helpers

with atheris.instrument_imports(include=["spidr", "tomllib", "tarfile", "zipfile"]):
    import json

    import test_fuzz as checks

    from spidr.data.write_manifest import write_manifest_tar  # noqa: F401 (so that it is instrumented)


def repacked(archive: bytes, name: str, content: bytes) -> bytes:
    """A zip archive in which one member has new content and a valid checksum."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(file, "w") as new:
        for member in old.namelist():
            new.writestr(member, content if member.endswith(name) else old.read(member))
    return file.getvalue()


def member(archive: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return next(file.read(found) for found in file.namelist() if found.endswith(name))


def with_checksums(archive: bytes) -> bytes:
    """A tar whose headers have valid checksums; otherwise only the first would ever be read."""
    content = bytearray(archive)
    for at in range(0, len(content) - 511, 512):
        if content[at + 257 : at + 262] == b"ustar":
            content[at + 148 : at + 156] = b" " * 8
            content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    return bytes(content)


def lines(rows: list[object]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


TOML = checks.to_toml(json.dumps(checks.CONFIG)).encode()
SMALL = checks.small_checkpoint(False)
Target = tuple[Callable[[bytes], None], list[bytes]]
TARGETS: dict[str, Callable[[], Target]] = {
    "toml": lambda: (lambda c: checks.check_config("c.toml", c), [TOML]),
    "json": lambda: (lambda c: checks.check_config("c.json", c), [json.dumps(checks.CONFIG).encode()]),
    "manifest": lambda: (lambda c: checks.check_manifest("m.csv", c), [checks.CSV, checks.SHORT_CSV]),
    "manifest-lines": lambda: (lambda c: checks.check_manifest("m.jsonl", c), [lines(checks.ROWS)]),
    "manifest-fairseq": lambda: (lambda c: checks.check_manifest("m.tsv", c), [checks.TSV]),
    "alignments": lambda: (lambda c: checks.check_alignments("a.jsonl", c), [lines(checks.ALIGNED)]),
    "alignments-gzip": lambda: (
        lambda c: checks.check_alignments("a.jsonl.gz", c), [gzip.compress(lines(checks.ALIGNED))],
    ),
    "textgrid": lambda: (lambda c: checks.check_alignments("a.TextGrid", c), [checks.GRID]),
    "units": lambda: (lambda c: checks.check_units("u.jsonl", c), [lines(checks.UNITS)]),
    "units-parquet": lambda: (lambda c: checks.check_units("u.parquet", c), [checks.parquet()]),
    "wav": lambda: (lambda c: checks.check_audio(c, "x.wav"), [checks.recording(*k)[:600] for k in checks.ENCODED]),
    "flac": lambda: (lambda c: checks.check_audio(c, "x.flac"), [checks.recording(*k)[:900] for k in checks.ENCODED]),
    "tar": lambda: (lambda c: checks.check_archive(with_checksums(c)), [checks.archive()]),
    "kmeans": lambda: (checks.check_kmeans, [checks.centroids()]),
    "kmeans-array": lambda: (
        lambda c: checks.check_kmeans(repacked(checks.centroids(), "centroids.npy", c)),
        [member(checks.centroids(), "centroids.npy")],
    ),
    "checkpoint": lambda: (checks.check_weights, [SMALL, checks.small_checkpoint(True)]),
    "checkpoint-pickle": lambda: (
        lambda c: checks.check_weights(repacked(SMALL, "data.pkl", c)), [member(SMALL, "data.pkl")],
    ),
    "safetensors": lambda: (checks.check_safetensors, [checks.safetensors()[:8000]]),
    "items": lambda: (checks.check_items, [checks.ITEMS]),
}  # fmt: skip
"""Targets, which read bytes and check the result, and valid bytes to start from."""


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        sys.exit(f"give one of {', '.join(TARGETS)}")
    read, seeds = TARGETS[name]()
    unraisable: list[str] = []
    # Errors in functions called from C appear nowhere else.
    sys.unraisablehook = lambda error: unraisable.append(repr(error.exc_value))

    def once(content: bytes) -> None:
        read(content)
        assert not unraisable, unraisable

    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as corpus:
        for number, seed in enumerate(seeds):
            (Path(corpus) / str(number)).write_bytes(seed)
        defaults = ["-timeout=60", "-rss_limit_mb=4096", f"-max_len={max(4096, *map(len, seeds))}"]
        given = sys.argv[1:]
        inputs = [] if any(not option.startswith("-") for option in given) else [corpus]
        atheris.Setup([sys.argv[0], *defaults, *given, *inputs], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

"""What is to be encoded: the recordings of manifests, folders and single files, each under a name of its own."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spidr.data.audio import FormatError, num_samples, read_audio, read_resampled, resampled_length
from spidr.data.dataset import recordings_of
from spidr.data.manifest import read_manifest
from spidr.data.recording import Recording
from spidr.tools.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MANIFESTS = {".csv", ".jsonl", ".tsv"}
AUDIO = {".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".wma", ".aif", ".aiff", ".webm", ".mp4"}
"""Endings of the files in a folder that are recordings."""


@dataclass(frozen=True)
class Item:
    """A recording to encode.

    Attributes:
        name: No other recording has the same; may have folders in it, and has no extension.
        recording: Where it is.
        num_samples: For batches and progress: by the manifest, else the header, else (MP3, Opus and other formats
            without an exact length there) by decoding all of it; 0 if it cannot be read.
        promised: Number of samples by the manifest, if there is one.
    """

    name: str
    recording: Recording
    num_samples: int
    promised: int | None = None


@dataclass(frozen=True)
class _Found:
    """A recording, its names from short to long, and its number of samples if the manifest tells."""

    recording: Recording
    fileid: str
    relative: str
    num_samples: int | None

    def names(self) -> tuple[str, str, str, str]:
        """The last one differs for any two recordings."""
        place = self.recording
        full = os.path.abspath(place.archive or place.path)  # noqa: PTH100
        if place.archive is not None:
            full += f"/{_inside(place.path)}@{place.byte_offset}"  # an archive can hold several members of one name
        relative = _inside(self.relative)
        return _inside(self.fileid), os.path.splitext(relative)[0], relative, full.lstrip("/")  # noqa: PTH122


def _inside(name: str) -> str:
    """A path that stays in the folder it is put in, where a manifest or an archive says ``/etc/x`` or ``../x``."""
    return os.path.normpath("/" + name).lstrip("/")


def find_items(sources: Sequence[str | Path], *, tree: bool, resample: bool, skip: bool) -> list[Item]:
    """List the recordings of some sources, each once.

    Args:
        sources: Manifests (see :func:`spidr.data.read_manifest`), folders and audio files.
        tree: Name recordings by their path below the source (for manifests, below what all paths have in common), else
            by their fileid, or without manifest their file name. Names that are not unique that way become longer, for
            all recordings: first the path below the source, then with the extension, then from the root on.
        resample: Recordings need not be 16 kHz mono.
        skip: A recording whose length cannot be read is listed all the same.

    Raises:
        InputError: A source does not exist or has no recording, or a recording cannot be read, without ``skip``.
    """
    found: dict[tuple[str | None, str, int], _Found] = {}
    for source in sources:
        for item in _find(Path(source)):
            place = item.recording
            path = place.path if place.archive is not None else os.path.realpath(place.path)
            found.setdefault((place.archive, path, place.byte_offset), item)
    items = list(found.values())
    length = resampled_length if resample else num_samples

    def measure(item: _Found) -> int:
        if item.num_samples is not None:
            return item.num_samples
        try:
            return length(item.recording)
        except InputError as error:
            if skip:
                return 0
            raise _with_remedy(error) from None

    with ThreadPoolExecutor() as pool:
        lengths = list(pool.map(measure, items))
    rows = zip(_unique_names(items, tree=tree), items, lengths, strict=True)
    return [Item(name, item.recording, samples, item.num_samples) for name, item, samples in rows]


def read_item(item: Item, *, resample: bool) -> NDArray[np.float32]:
    """All samples of a recording, float32 (S,).

    Raises:
        InputError: It cannot be read; or, without ``resample``, it is not 16 kHz mono, or not as long as the manifest
            says, give or take a sample. With ``resample`` the length is not checked.
    """
    try:
        samples = read_resampled(item.recording) if resample else read_audio(item.recording)
    except InputError as error:
        raise _with_remedy(error) from None
    # libsndfile reads a truncated WAV without a word. Lengths by spidr 0.1.2 are rounded durations: one off at most.
    if item.promised is not None and abs(item.promised - len(samples)) > 1 and not resample:
        raise InputError(
            f"{item.recording}: {len(samples)} samples, the manifest says {item.promised}: truncated or changed since; "
            "write the manifest again."
        )
    return samples


def _with_remedy(error: InputError) -> InputError:
    return InputError(f"{error} --resample does it on the way.") if isinstance(error, FormatError) else error


def _unique_names(items: list[_Found], *, tree: bool) -> list[str]:
    candidates = list(zip(*(item.names() for item in items), strict=True))[1 if tree else 0 :]
    return list(next(names for names in candidates if len(set(names)) == len(items)))


def _find(source: Path) -> list[_Found]:
    if os.path.isdir(source):  # noqa: PTH112
        return _in_folder(source)
    if not os.path.exists(source):  # noqa: PTH110 (False for all that cannot be a file)
        raise InputError(f"{source}: does not exist; expected a manifest, a folder or an audio file.")
    if source.suffix in MANIFESTS:
        return _in_manifest(source)
    if source.suffix.lower() == ".tar":
        raise InputError(
            f"{source}: write the manifest of an archive first: `python -m spidr.data.write_manifest {source} OUT.csv`."
        )
    return [_Found(Recording(str(source)), source.stem, source.name, None)]


def _in_folder(folder: Path) -> list[_Found]:
    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: the folder cannot be read ({error.strerror}).")

    paths = sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=fail)
        for name in names
        if os.path.splitext(name)[1].lower() in AUDIO and not name.startswith(".")  # noqa: PTH122
    )
    if not paths:
        raise InputError(f"{folder}: no file's name ends like that of a recording ({', '.join(sorted(AUDIO))}).")
    return [_Found(Recording(str(path)), path.stem, str(path.relative_to(folder)), None) for path in paths]


def _in_manifest(path: Path) -> list[_Found]:
    manifest = read_manifest(path)
    recordings = recordings_of(manifest)
    files = [os.path.dirname(os.path.abspath(r.path)) for r in recordings if r.archive is None]  # noqa: PTH100, PTH120
    root = os.path.commonpath(files) if files else ""
    relative = [r.path if r.archive is not None else os.path.relpath(r.path, root) for r in recordings]
    rows = zip(recordings, manifest["fileid"].to_list(), relative, manifest["num_samples"].to_list(), strict=True)
    return [_Found(*row) for row in rows]

"""Recordings to encode, from manifests, lists, folders and single files, each under its own name."""

import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from spidr.data import audio
from spidr.data.manifest import is_table, read_manifest, recordings_of
from spidr.data.measure import measure, problems_of
from spidr.data.names import AUDIO
from spidr.data.recording import Recording
from spidr.extract.options import Options
from spidr.tools.errors import InputError
from spidr.tools.files import check_file, expand, find_files

TOO_SHORT = "too short, they do not fill one frame"


@dataclass(frozen=True)
class Item:
    """A recording to encode."""

    recording: Recording
    fileid: str  # its name in the manifest, or its file's name without the suffix
    relative: str  # its path below its source; in manifests, below the folder that all paths share
    promised: int = 0  # number of samples in the manifest; 0: unknown
    speaker: str = ""  # the manifest's column `speaker`, or the name of its folder
    name: str = ""  # unique in the output; may contain folders
    num_samples: int = 0  # for batches and progress; 0: unknown

    @property
    def place(self) -> str:
        """The recording's location, independent of the current folder."""
        where = self.recording
        place = os.path.abspath(where.archive or where.path)  # noqa: PTH100
        if where.archive is not None:
            place += f":{where.path}"
            if where.byte_offset:  # an archive may have several members with the same name
                place += f"@{where.byte_offset}"
        if where.start is not None or where.end is not None:
            place += f"[{where.start or 0:g}-{'' if where.end is None else f'{where.end:g}'}]"
        return place

    def names(self) -> list[str]:
        """Candidate names, from short to long."""
        fileid, relative, place = _inside(self.fileid), _inside(self.relative), _inside(self.place)
        return [fileid, os.path.splitext(relative)[0], relative, place, f"{place}:{fileid}"]  # noqa: PTH122


def _inside(name: str) -> str:
    """Keep a path from a manifest or an archive, such as ``/etc/x`` or ``../x``, inside its target folder."""
    return os.path.normpath("/" + name).lstrip("/")


def find_items(sources: str | Path | Sequence[str | Path]) -> list[Item]:
    """List the recordings of sources, without names. One that occurs twice under the same fileid is listed once.

    Args:
        sources: Manifests and lists (see :func:`spidr.data.read_manifest`), folders and audio files.

    Raises:
        InputError: A source does not exist or has no recordings.
    """
    given = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not given:
        raise InputError("no sources given: name manifests, folders or audio files")
    items = (item for source in given for item in _find(expand(source)))
    return list({(item.place, item.fileid): item for item in items}.values())


def _find(source: Path) -> list[Item]:
    if os.path.isdir(source):  # noqa: PTH112
        paths = [Path(path) for path in find_files(source, lambda name: name.lower().endswith(AUDIO))]
        if not paths:
            raise InputError(f"{source}: no file's name ends like that of a recording ({', '.join(sorted(AUDIO))}).")
        return [_of_file(path, str(path.relative_to(source))) for path in paths]
    if not os.path.exists(source):  # noqa: PTH110 (False for all that cannot be a file)
        raise InputError(f"{source}: does not exist; expected a manifest, a folder or an audio file.")
    if source.suffix.lower() not in AUDIO and is_table(source):
        return _in_manifest(source)
    if source.suffix.lower() == ".tar":
        raise InputError(
            f"{source}: write the manifest of an archive first: `python -m spidr.data.write_manifest {source} OUT.csv`."
        )
    return [_of_file(source, source.name)]


def _of_file(path: Path, relative: str) -> Item:
    return Item(Recording(str(path)), path.stem, relative, speaker=path.absolute().parent.name)


def _in_manifest(path: Path) -> list[Item]:
    manifest = read_manifest(path, needs_audio=True)
    recordings = recordings_of(manifest)
    folders = [Path(os.path.abspath(r.path)).parent for r in recordings]  # noqa: PTH100
    in_files = [folder for folder, r in zip(folders, recordings, strict=True) if r.archive is None]
    root = os.path.commonpath(in_files) if in_files else ""
    relative = [r.path if r.archive is not None else os.path.relpath(r.path, root) for r in recordings]
    lengths = manifest["num_samples"].fill_null(0) if "num_samples" in manifest.columns else [0] * len(recordings)
    speakers = manifest["speaker"] if "speaker" in manifest.columns else [folder.name for folder in folders]
    # fairseq's manifests name recordings by their relative path.
    names = [
        Path(fileid).stem if r.path.endswith(fileid) and fileid.lower().endswith(AUDIO) else fileid
        for fileid, r in zip(manifest["fileid"].to_list(), recordings, strict=True)
    ]
    rows = zip(recordings, names, relative, lengths, speakers, strict=True)
    return [Item(*row[:4], speaker=str(row[4])) for row in rows]


def name_items(items: Sequence[Item], known: Mapping[str, str], *, tree: bool) -> list[Item]:
    """Give each recording a unique name: the shortest that no other has.

    Candidates are the fileid (not with ``tree``), the path below the source without and with the suffix, and the path
    from the root. A recording with a name in ``known``, which maps names to places, keeps it.
    """
    choices = [item.names()[1 if tree else 0 :] for item in items]
    before = defaultdict(set)
    for name, place in known.items():
        before[place].add(name)
    levels, kept = [0] * len(items), set()
    for i, item in enumerate(items):
        asked_for = not tree and item.fileid != Path(item.recording.path).stem  # by a table
        for level, name in enumerate(choices[i][:1] if asked_for else choices[i]):
            if name in before.get(item.place, ()):
                levels[i] = level
                kept.add(i)
                break
    while True:
        names = [names[level] for names, level in zip(choices, levels, strict=True)]
        counts = Counter(names)
        clashing = [i for i, name in enumerate(names) if counts[name] > 1 and levels[i] + 1 < len(choices[i])]
        if not clashing:
            return [replace(item, name=name) for item, name in zip(items, names, strict=True)]
        for i in [i for i in clashing if i not in kept] or clashing:
            levels[i] += 1


def find_lengths(items: Sequence[Item], options: Options, *, shortest: int) -> tuple[list[Item], dict[str, str]]:
    """Find the length of each recording, from its manifest (if the file exists) or its header.

    Returns:
        The recordings with their lengths, and why others cannot be encoded, by name.

    Raises:
        InputError: Some cannot be encoded and are not to be skipped.
    """

    def look(item: Item) -> Item:
        where = item.recording
        if item.promised:
            check_file(where.archive or where.path)
            count = item.promised
        else:
            count = (audio.resampled_length if options.resample else audio.num_samples)(where)
        # A manifest of spidr 0.1.2 may be one sample short.
        if 0 < count < shortest - bool(item.promised):
            raise InputError(f"{where}: {count} samples are {TOO_SHORT}")
        return replace(item, num_samples=count)

    looked = list(measure(look, items, total=len(items), progress=options.progress, description="Lengths"))
    found = [result for result in looked if isinstance(result, Item)]
    pairs = zip(items, looked, strict=True)
    problems = {item.name: explained(result) for item, result in pairs if isinstance(result, InputError)}
    if problems and options.on_error == "raise":
        raise problems_of(list(problems.values()), len(items), "--on-error skip leaves them out")
    return found, {name: str(problem) for name, problem in problems.items()}


class LongRecording:
    """A recording that is read a part at a time.

    One that cannot be read from the middle, or must be resampled, is first decoded into a temporary file.
    """

    def __init__(self, recording: Recording, *, resample: bool) -> None:
        self._recording = recording
        self._file: IO[bytes] | None = None
        length = None if resample else audio.seekable_length(recording)
        if length is None:
            self._file = file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with this object)
            length = sum(file.write(block.data) for block in audio.stream(recording, resample=resample)) // 4
        self._length = length

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Samples ``start`` to ``stop``."""
        if self._file is None:
            return audio.read_audio(self._recording, start, stop)
        self._file.seek(4 * start)
        return np.frombuffer(bytearray(self._file.read(4 * (stop - start))), dtype=np.float32)


def explained(error: InputError) -> InputError:
    """Add a hint about --resample to an error about a recording's format."""
    return InputError(f"{error} --resample does it on the way.") if isinstance(error, audio.FormatError) else error

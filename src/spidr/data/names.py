"""Match the names of recordings in alignments, units, features and items."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import PurePosixPath

from spidr.tools.errors import InputError, some

_AUDIO = (
    "3gp aac aif aifc aiff amr au caf flac gsm m4a mka mp3 mp4 nist oga ogg opus rf64 snd sph w64 wav wave webm wma"
)
AUDIO = tuple(f".{ending}" for ending in _AUDIO.split())
"""Suffixes of recordings. How a file is decoded depends on its content only."""
ENDINGS = frozenset(f"{_AUDIO} json lab mov mp2 npy npz phn pt raw textgrid txt wv".split())
"""Suffixes that are not part of a name; ``session.1`` and ``session.2`` are two names."""


def plain_name(name: str) -> str:
    """Strip known suffixes: ``spk/a.1.wav`` is ``spk/a.1``."""
    stem, dot, ending = name.rpartition(".")
    return plain_name(stem) if dot and stem and stem[-1] != "/" and ending.lower() in ENDINGS else name


def match_names(names: Collection[str], wanted: Iterable[str]) -> dict[str, str]:
    """Find the name of each wanted recording among ``names``; those not found are absent from the result.

    Names are equal without known suffixes, or if one is the other with folders before it: ``001`` matches ``spk1/001``,
    but ``spk2/001`` does not.

    Raises:
        InputError: A wanted recording matches several names, or a name several of them.
    """
    whole: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    by_tail: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in names:
        parts = _parts(name)
        whole[parts].append(name)
        for first in range(1, len(parts)):
            by_tail[parts[first:]].append(name)
    matched: dict[str, str] = {}
    meant_by: dict[str, str] = {}
    for want in wanted:
        parts = _parts(want)
        with_fewer_folders = [name for first in range(1, len(parts)) for name in whole[parts[first:]]]
        found = [want] if want in names else whole[parts] or by_tail[parts] + with_fewer_folders
        if len(found) > 1:
            raise InputError(f"{want}: several recordings could be meant: {some(sorted(found), 3)}.")
        for name in found:
            if meant_by.setdefault(name, want) != want:
                both = ", ".join(sorted((meant_by[name], want)))
                raise InputError(f"{name}: several recordings could be meant: {both}.")
            matched[want] = name
    return matched


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(plain_name(name.replace("\\", "/"))).parts if part not in ("/", "."))


def match_rows(names: Collection[str], fileids: Sequence[str], paths: Sequence[str]) -> dict[int, str]:
    """Find the name of each row's recording among ``names``, by fileid if fileids are unique, otherwise by path.

    See :func:`match_names`.
    """
    by_fileid = match_names(names, fileids) if len(set(fileids)) == len(fileids) else {}
    rows = list(enumerate(zip(fileids, paths, strict=True)))
    others = [path for _, (fileid, path) in rows if fileid not in by_fileid]
    by_path = match_names(set(names) - set(by_fileid.values()), others)
    found = {row: by_fileid.get(fileid) or by_path.get(path) for row, (fileid, path) in rows}
    return {row: name for row, name in found.items() if name is not None}

"""Match the names of recordings, of alignments, units, features and items alike."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import PurePosixPath

from spidr.tools.errors import InputError, some

_AUDIO = "aac aif aifc aiff amr au caf flac gsm m4a mka mov mp2 mp3 mp4 nist oga ogg opus raw snd sph w64 wav webm wma"
_OTHERS = "wv json lab npy npz phn pt textgrid txt"
ENDINGS = frozenset(f"{_AUDIO} {_OTHERS}".split())
"""Suffixes that are not part of a name; ``session.1`` and ``session.2`` are two names."""

Parts = tuple[str, ...]


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
    by_tail: dict[Parts, list[str]] = {}
    for name in names:
        parts = _parts(name)
        for first in range(len(parts)):
            by_tail.setdefault(parts[first:], []).append(name)
    matched: dict[str, str] = {}
    meant_by: dict[str, str] = {}
    for want in wanted:
        if (found := _find(want, names, by_tail)) is None:
            continue
        if meant_by.setdefault(found, want) != want:
            raise InputError(
                f"{found}: several recordings could be meant: {', '.join(sorted((meant_by[found], want)))}."
            )
        matched[want] = found
    return matched


def _find(want: str, names: Collection[str], by_tail: dict[Parts, list[str]]) -> str | None:
    if want in names:
        return want
    parts = _parts(want)
    with_folders = by_tail.get(parts, [])
    same = [name for name in with_folders if len(_parts(name)) == len(parts)]
    without = [name for i in range(1, len(parts)) for name in by_tail.get(parts[i:], []) if _parts(name) == parts[i:]]
    found = same or [*with_folders, *without]
    if len(found) > 1:
        raise InputError(f"{want}: several recordings could be meant: {some(sorted(found), 3)}.")
    return found[0] if found else None


def _parts(name: str) -> Parts:
    return tuple(part for part in PurePosixPath(plain_name(name.replace("\\", "/"))).parts if part not in ("/", "."))


def match_rows(names: Collection[str], fileids: Sequence[str], paths: Sequence[str]) -> dict[int, str]:
    """Find the name of each row's recording among ``names``, by its fileid if fileids are unique, else by its path.

    See :func:`match_names`.
    """
    by_fileid = match_names(names, fileids) if len(set(fileids)) == len(fileids) else {}
    others = [path for fileid, path in zip(fileids, paths, strict=True) if fileid not in by_fileid]
    by_path = match_names(set(names) - set(by_fileid.values()), others)
    return {
        row: by_fileid.get(fileid) or by_path[path]
        for row, (fileid, path) in enumerate(zip(fileids, paths, strict=True))
        if fileid in by_fileid or path in by_path
    }

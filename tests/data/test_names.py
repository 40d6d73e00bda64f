"""Which recording is meant."""

import pytest

from spidr.data.names import match_names, match_rows, plain_name
from spidr.tools.errors import InputError


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a.wav", "a"),
        ("s/session.1.FLAC", "s/session.1"),
        ("session.1", "session.1"),
        ("rec.1.TextGrid", "rec.1"),
        ("a.wav.npy", "a"),
        ("v1.0/a", "v1.0/a"),
        ("/data/.wav", "/data/.wav"),
        (".npy", ".npy"),
    ],
)
def test_only_known_extensions_are_removed(name: str, plain: str) -> None:
    assert plain_name(name) == plain


@pytest.mark.parametrize(
    ("names", "wanted", "found"),
    [
        (["session.2"], "session.1", None),
        (["session.1"], "session.1.wav", "session.1"),
        (["spk1/001"], "spk2/001", None),
        (["spk1/001"], "001", "spk1/001"),
        (["001"], "spk1/001", "001"),
        (["spk1/001"], "corpus/spk1/001.flac", "spk1/001"),
        (["/data/spk1/001.flac"], "spk1/001", "/data/spk1/001.flac"),
        (["/data/spk1/001.flac"], "/other/spk1/001.flac", None),
        (["spk1/001", "001"], "001", "001"),
        (["a/001", "b/001"], "b/001", "b/001"),
        (["ab"], "x/b", None),
        (["spk\\001.wav"], "spk/001", "spk\\001.wav"),
        ([], "a", None),
    ],
)
def test_whole_trailing_paths(names: list[str], wanted: str, found: str | None) -> None:
    assert match_names(names, [wanted]) == ({} if found is None else {wanted: found})


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["a/001", "b/001"], ["001"]),
        (["001"], ["a/001", "b/001"]),
        (["a.wav", "a.flac"], ["a"]),
        (["b/c", "c"], ["a/b/c"]),
    ],
)
def test_ambiguous_names(names: list[str], wanted: list[str]) -> None:
    with pytest.raises(InputError, match="several recordings could be meant"):
        match_names(names, wanted)


def test_rows_of_a_manifest() -> None:
    """By fileid if it is unique, otherwise by path."""
    names = ["spk1/001", "spk2/001"]
    assert match_rows(names, ["x", "spk2/001"], ["/d/spk1/001.wav", "/d/2.wav"]) == {0: "spk1/001", 1: "spk2/001"}
    assert match_rows(names, ["001", "001"], ["/d/spk1/001.wav", "/d/spk2/001.wav"]) == {0: "spk1/001", 1: "spk2/001"}
    assert match_rows(["other"], ["a"], ["b.wav"]) == {}

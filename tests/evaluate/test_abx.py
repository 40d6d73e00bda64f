"""ABX on cases with error rates that can be counted by hand."""

import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import spidr.abx
from spidr.evaluate.abx import Scorer, evaluate_abx, read_items
from spidr.tools.errors import InputError

needs_fastabx = pytest.mark.skipif(sys.version_info < (3, 12), reason="fastabx needs Python 3.12")
HEADER = "#file onset offset #phone prev-phone next-phone speaker"


def write_items(path: Path, *lines: str) -> Path:
    path.write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
    return path


def phones(speaker: str, *names: str) -> list[str]:
    """A recording named after its speaker, with a phone every 40 ms, all in the same context."""
    return [f"{speaker} {0.04 * i:.2f} {0.04 * (i + 1):.2f} {name} x y {speaker}" for i, name in enumerate(names)]


def frames(**vectors: list[list[float]]) -> dict[str, NDArray[Any]]:
    """Two equal frames per phone, 50 frames a second."""
    return {name: np.array(rows, np.float32).repeat(2, axis=0) for name, rows in vectors.items()}


@needs_fastabx
def test_the_old_name_works() -> None:
    assert spidr.abx.read_items is read_items


@needs_fastabx
def test_separate_and_mixed_phones(tmp_path: Path) -> None:
    items = read_items(
        write_items(tmp_path / "a.item", *phones("s1", "A", "A", "B", "B"), *phones("s2", "A", "A", "B", "B"))
    )
    a, b = [1.0, 0.0], [0.0, 1.0]
    apart = Scorer(items).score(frames(s1=[a, a, b, b], s2=[a, a, b, b]))
    assert apart == (0.0, 0.0, 8, 0)
    # s1 has no errors. In s2 each phone sounds once like A and once like B, so each X is farther from A than from one
    # B and as far as from the other: (1 + 1/2) / 2 wrong.
    mixed = Scorer(items).score(frames(s1=[a, a, b, b], s2=[a, b, a, b]))
    assert mixed.within == pytest.approx((0 + 0.75) / 2)
    # A and B by s1, X by s2: half are wrong. A and B by s2, X by s1: closer to A, closer to B, or as far: half of it.
    assert mixed.across == pytest.approx(0.5)
    same = Scorer(items).score(frames(s1=[a, a, a, a], s2=[a, a, a, a]))
    assert (same.within, same.across) == (0.5, 0.5)
    swapped = Scorer(items).score(frames(s1=[a, a, b, b], s2=[b, b, a, a]))
    assert (swapped.within, swapped.across) == (0.0, 1.0)


@needs_fastabx
def test_units_are_equal_or_not(tmp_path: Path) -> None:
    items = read_items(write_items(tmp_path / "a.item", *phones("s1", "A", "A", "B", "B")))
    units = {"folder/s1": np.array([7, 7, 7, 7, 200, 200, 201, 201])}
    scorer = Scorer(items)
    # X = A: no errors. X = B, with the other B as A: as far from it as from any A.
    assert scorer.score(units, "identical") == (0.25, None, 4, 0)
    assert scorer.score({"s1": np.array([[7, 1.0]] * 4 + [[-9, 5]] * 4)}).within == 0.0


@needs_fastabx
def test_another_context(tmp_path: Path) -> None:
    lines = ["r 0.00 0.04 A x y s", "r 0.04 0.08 A x y s", "r 0.08 0.12 B z y s", "r 0.12 0.16 B z y s"]
    items = read_items(write_items(tmp_path / "a.item", *lines))
    features = frames(r=[[1, 0], [1, 0], [0, 1], [0, 1]])
    assert Scorer(items).score(features).within is None  # no B in A's context


@needs_fastabx
def test_frames_of_an_item_are_those_of_fastabx(tmp_path: Path) -> None:
    """Against fastabx reading the same items and features from files, including phones of odd lengths."""
    import fastabx
    import torch

    rng = np.random.default_rng(0)
    lines, features = [], {}
    for file in ("a", "b"):
        time = 0
        for _ in range(150):
            length = int(rng.integers(25, 180))
            phone, context = rng.choice(["A", "B", "C"]), rng.choice(["x", "y"])
            lines.append(f"{file} {time / 1000} {(time + length) / 1000} {phone} {context} y {file}")
            time += length
        features[file] = rng.standard_normal((time // 20 + 1, 8)).astype(np.float32)
        torch.save(torch.from_numpy(features[file]), tmp_path / f"{file}.pt")
    path = write_items(tmp_path / "a.item", *lines)
    found = Scorer(read_items(path)).score(features)
    assert found.too_short == 0
    for speaker in ("within", "across"):
        expected = fastabx.zerospeech_abx(
            path, tmp_path, max_size_group=10, max_x_across=5, speaker=speaker, progress=False, device="cpu"
        )
        assert getattr(found, speaker) == pytest.approx(expected, abs=1e-7)
        assert 0.3 < expected < 0.7


@needs_fastabx
def test_items_without_a_frame(tmp_path: Path) -> None:
    """The middle of a frame must be within the item, or on its edge; a recording's last frames may be missing."""
    lines = ["r 0.031 0.049 A x y s", "r 0.05 0.05 B x y s", "r 0.10 0.14 A x y s", "r 0.13 0.15 A x y s"]
    items = read_items(write_items(tmp_path / "a.item", *lines))
    scorer = Scorer(items)
    features = {"r": np.ones((6, 2), np.float32)}
    assert scorer.score(features)[2:] == (2, 2)  # the first has no frame, the last lies after the end
    with pytest.raises(InputError, match=r"a\.item: an item ends at frame 8 of r, which has 5 frames; is the frame"):
        scorer.score({"r": features["r"][:5]})
    with pytest.raises(InputError, match="no frame lies within any item"):
        Scorer(items, frame_rate=Fraction(1, 10)).score(features)


@needs_fastabx
def test_bad_features(tmp_path: Path) -> None:
    scorer = Scorer(read_items(write_items(tmp_path / "a.item", *phones("s1", "A", "A", "B"), *phones("s2", "A"))))
    with pytest.raises(InputError, match=r"a\.item: no features of 1 recordings, such as s2"):
        scorer.score(frames(s1=[[1, 0]] * 3))
    with pytest.raises(InputError, match="not finite"):
        scorer.score(frames(s1=[[1, 0]] * 3, s2=[[np.nan, 0]]))
    with pytest.raises(InputError, match="distance: found 'cos', expected one of angular, euclidean"):
        scorer.score(frames(s1=[[1, 0]] * 3, s2=[[1, 0]]), "cos")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no item in the file"),
        ("r 0 1 A x y s\n", "the first line lacks #file, onset"),
        ("#file onset offset #phone\n", "the first line lacks prev-phone, next-phone, speaker"),
        (HEADER + "\n", "no item in the file"),
        (HEADER + "\nr 0.1 x A x y s\n", "line 2: expected #file onset"),
        (HEADER + "\nr 0.1 0.2 A x y s\nr 0.1 0.2 A x y\n", "line 3: expected"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_bad_item_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.item"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match=message):
        read_items(path)


@needs_fastabx
@pytest.mark.parametrize("separator", ["\t", " "])
def test_items_as_people_write_them(tmp_path: Path, separator: str) -> None:
    """A byte order mark, tabs, a name with spaces, an empty last line, an onset just before the recording."""
    rows = [line.split() for line in [HEADER, *phones("s1", "A", "A", "B", "B")]]
    rows[1][1] = "-0.02"
    named = [[row[0].replace("s1", "my rec.1"), *row[1:]] for row in rows]
    path = tmp_path / "a.item"
    path.write_text("\n".join(separator.join(row) for row in named) + "\n\n", encoding="utf-8-sig")
    items = read_items(path)
    assert set(items.files) == {"my rec.1"}
    a, b = [1.0, 0.0], [0.0, 1.0]
    assert Scorer(items).score({"my rec.1": np.array([a, a, a, a, b, b, b, b])}) == (0.0, None, 4, 0)


@needs_fastabx
def test_the_frame_rate_is_as_recorded(tmp_path: Path) -> None:
    """At half the rate, every item would be found in the wrong place."""
    items = read_items(write_items(tmp_path / "a.item", *phones("s1", "A", "A", "B", "B")))
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features" / "s1.npy", np.array([[1.0, 0.0]] * 8 + [[0.0, 1.0]] * 8))
    (tmp_path / "features" / "extract.json").write_text('{"frame_seconds": 0.01}')
    with pytest.raises(InputError, match="features: has 100 frames per second, not 50: --frame-rate"):
        evaluate_abx(tmp_path / "features", Scorer(items))
    assert evaluate_abx(tmp_path / "features", Scorer(items, frame_rate=100)).within == 0.0


def test_without_fastabx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = read_items(write_items(tmp_path / "a.item", *phones("s1", "A")))
    monkeypatch.setitem(sys.modules, "fastabx", None)
    with pytest.raises(InputError, match=r"^`fastabx` is missing: .* 'spidr\[abx\]'` \(Python 3\.12 or newer\)$"):
        Scorer(items)
    with pytest.raises(InputError, match="cannot be read"):
        read_items(tmp_path / "gone.item")

"""Phones per 10 ms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spidr.config import InputError
from spidr.data.alignments import match_alignments, read_alignments

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "alignments.jsonl"


def write(tmp_path: Path, *rows: object) -> Path:
    file = tmp_path / "alignments.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_intervals_and_frames(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"fileid": "a", "phones": [["SIL", 0.0, 0.02], ["AA", 0.02, 0.045], ["B", 0.045, 0.0579]]},
        {"name": "0017", "phones": ["SIL", "B"]},
    )
    # The middle of frame 4 is at 45 ms: there B has begun. The last 7.9 ms are no whole frame.
    assert read_alignments(file) == {"a": ["SIL", "SIL", "AA", "AA", "B"], "0017": ["SIL", "B"]}


def test_against_a_search_frame_by_frame() -> None:
    alignments = read_alignments(QUICKSTART)
    rows = [json.loads(line) for line in QUICKSTART.read_text().splitlines()]
    assert alignments.keys() == {row["fileid"] for row in rows}
    for row in rows[::10]:
        milliseconds = [(phone, round(1000 * start, 4), round(1000 * end, 4)) for phone, start, end in row["phones"]]
        frames = int(round(row["duration"] * 100, 6))
        expected = [
            next(phone for phone, start, end in milliseconds if start <= 10 * i + 5 < end) for i in range(frames)
        ]
        assert alignments[row["fileid"]] == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (({"fileid": "a", "phones": ["A"]}, {"name": "a", "phones": ["B"]}), "line 2: 'a' is aligned twice"),
        (({"fileid": "a"},), "line 1: expected a JSON object"),
        (({"fileid": 3, "phones": ["A"]},), "line 1: expected"),
        (({"fileid": "a", "phones": []},), "line 1: expected"),
        (({"fileid": "a", "phones": [["A", 0.5, 0.2]]},), "line 1: expected"),
        (({"fileid": "a", "phones": [["A", 0, 0.2], ["B", 0.1, 0.3]]},), "line 1: expected"),
        (({"fileid": "a", "phones": [["A", 0]]},), "line 1: expected"),
        ((["a"],), "line 1: expected"),
        ((), "no alignment"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, rows: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_alignments(write(tmp_path, *rows))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_alignments(tmp_path / "gone.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not a UTF-8"):
        read_alignments(tmp_path / "binary.jsonl")


def test_match() -> None:
    alignments = {"a": ["A"], "x/b.wav": ["B"], "x/c": ["C"], "y/c": ["D"]}
    assert match_alignments(alignments, ["a", "b", "z"]) == {"a": ["A"], "b": ["B"]}
    with pytest.raises(InputError, match="x/c, y/c"):
        match_alignments(alignments, ["c"])

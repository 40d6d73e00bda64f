"""Phones per 10 ms."""

import gzip
import json
from pathlib import Path

import pytest
from praatio import textgrid

from spidr.data.alignments import read_alignments
from spidr.tools.errors import InputError

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
    # The middle of frame 4 is at 45 ms, when B has begun. The last 7.9 ms are not a whole frame.
    assert read_alignments(file) == {"a": ["SIL", "SIL", "AA", "AA", "B"], "0017": ["SIL", "B"]}


def test_no_phone_ends_after_the_duration(tmp_path: Path) -> None:
    file = write(tmp_path, {"fileid": "a", "duration": 0.02, "phones": [["A", 0, 0.02], ["B", 0.02, 0.04]]})
    assert read_alignments(file) == {"a": ["A", "A", "B", "B"]}


def test_against_a_search_for_every_frame() -> None:
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
        (({"fileid": "a", "phones": [["A", 0.5, 0.2]]},), "line 1: interval 1, 'A' from 0.5 to 0.2 s: ends before it"),
        (({"fileid": "a", "phones": [["A", 0, 0.2], ["B", 0.1, 0.3]]},), "interval 2, 'B' from 0.1 to 0.3 s: begins"),
        (({"fileid": "a", "phones": [["A", 0, 90_000]]},), "line 1: a duration of 90000 s, not from 0 to 86400"),
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
    with pytest.raises(InputError, match="line 1: not UTF-8 text"):
        read_alignments(tmp_path / "binary.jsonl")


def test_compressed_lines(tmp_path: Path) -> None:
    content = b'{"fileid": "a", "phones": ["B", "C"]}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    assert read_alignments(tmp_path / "a.jsonl.gz") == {"a": ["B", "C"]}
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(InputError, match="cannot be read"):
        read_alignments(tmp_path / "cut.jsonl.gz")
    (tmp_path / "plain.jsonl.gz").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        read_alignments(tmp_path / "plain.jsonl.gz")


def write_grid(path: Path, *tiers: textgrid.IntervalTier | textgrid.PointTier, form: str = "long_textgrid") -> Path:
    grid = textgrid.Textgrid(0, 0.0579)
    for tier in tiers:
        grid.addTier(tier)
    path.parent.mkdir(exist_ok=True)
    grid.save(str(path), format=form, includeBlankSpaces=True)
    return path


def tier(name: str, *entries: tuple[float, float, str]) -> textgrid.IntervalTier:
    return textgrid.IntervalTier(name, entries, 0, 0.0579)


@pytest.mark.parametrize("form", ["long_textgrid", "short_textgrid"])
def test_textgrids(tmp_path: Path, form: str) -> None:
    """The intervals of the first test, with a gap as the silence, beside other tiers."""
    phones = tier("speaker - phones", (0.02, 0.045, "AA"), (0.045, 0.0579, "ʃ"))
    others = tier("speaker - words", (0.0, 0.05, "ash")), textgrid.PointTier("events", [(0.01, "x")], 0, 0.0579)
    write_grid(tmp_path / "s1" / "a.TextGrid", others[0], phones, others[1], form=form)
    only = write_grid(tmp_path / "s2" / "b.textgrid", tier("whatever", (0.0, 0.03, "sp"), (0.03, 0.05, "B")), form=form)
    assert read_alignments(tmp_path) == {
        "s1/a": ["SIL", "SIL", "AA", "AA", "ʃ"],
        "s2/b": ["SIL", "SIL", "SIL", "B", "B"],
    }
    assert read_alignments(only) == {"b": ["SIL", "SIL", "SIL", "B", "B"]}
    assert read_alignments(tmp_path / "s1", tier="speaker - words") == {"a": ["ash"] * 5}


def test_bad_textgrids(tmp_path: Path) -> None:
    two = write_grid(tmp_path / "a.TextGrid", tier("x", (0, 0.02, "A")), tier("y", (0, 0.02, "A")))
    with pytest.raises(InputError, match=r"a\.TextGrid: cannot tell the tier of the phones; .*: x, y"):
        read_alignments(two)
    with pytest.raises(InputError, match=r"no tier 'phones'; tiers of intervals found: x, y"):
        read_alignments(two, tier="phones")
    two.write_text(two.read_text().replace('"y"', '"x"'))
    with pytest.raises(InputError, match=r"several tiers 'x'; tiers of intervals found: x, x"):
        read_alignments(two, tier="x")
    two.write_text("nothing of the kind")
    with pytest.raises(InputError, match=r"a\.TextGrid: not a TextGrid"):
        read_alignments(two)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \.TextGrid in the folder"):
        read_alignments(tmp_path / "empty")


def textgrid_text(intervals: list[tuple[str, str, str]]) -> str:
    """A long TextGrid with numbers as other programs write them."""
    head = 'File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0\nxmax = 0.2\ntiers? <exists>\nsize = 1\n'
    head += 'item []:\n item [1]:\n class = "IntervalTier"\n name = "phones"\n xmin = 0\n xmax = 0.2\n'
    lines = [f" intervals: size = {len(intervals)}\n"]
    for number, (start, end, label) in enumerate(intervals, start=1):
        lines.append(f' intervals [{number}]:\n xmin = {start}\n xmax = {end}\n text = "{label}"\n')
    return head + "".join(lines)


A, B = ["A"] * 4, ["B"] * 16


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([("0", "0.04000000001", "A"), ("0.04", "0.2", "B")], [*A, *B]),
        ([("0", "0.0405", "A"), ("0.04", "0.2", "B")], [*A, *B]),
        ([("0", "0.04", "A"), ("0.04", "0.04", "Z"), ("0.04", "0.2", "B")], [*A, *B]),
        ([("0", "4E-02", "A"), ("4e-2", "0.2", "B")], [*A, *B]),
        ([("0", "5e-05", "Z"), ("5e-05", "0.04", "A"), ("0.04", "0.2", "B")], [*A, *B]),
        ([("0", "0.04", "sil"), ("0.04", "0.2", "")], ["SIL"] * 20),
    ],
)
def test_textgrids_with_rounded_times(
    tmp_path: Path, intervals: list[tuple[str, str, str]], expected: list[str]
) -> None:
    (tmp_path / "a.TextGrid").write_text(textgrid_text(intervals))
    (tmp_path / "._a.TextGrid").write_bytes(b"\0macOS")
    assert read_alignments(tmp_path) == {"a": expected}
    (tmp_path / "a.TextGrid").write_text("\ufeff" + textgrid_text(intervals), encoding="utf-16")
    assert read_alignments(tmp_path) == {"a": expected}


def test_bad_textgrids_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "good.TextGrid").write_text(textgrid_text([("0", "0.2", "A")]))
    (tmp_path / "overlap.TextGrid").write_text(textgrid_text([("0", "0.1", "A"), ("0.05", "0.2", "B")]))
    (tmp_path / "other.TextGrid").write_text("else")
    with pytest.raises(InputError) as info:
        read_alignments(tmp_path)
    message = str(info.value)
    assert "overlap.TextGrid: tier 'phones': interval 2, 'B' from 0.05 to 0.2 s: begins before 0.1 s" in message
    assert "other.TextGrid: not a TextGrid" in message
    skipped: dict[str, str] = {}
    assert list(read_alignments(tmp_path, skipped=skipped)) == ["good"]
    assert [Path(place).name for place in skipped] == ["other.TextGrid", "overlap.TextGrid"]


SILENT = ["sil", "sp", "", "SIL", "<sil>", "pau", "spn"]


def test_silence_has_one_rule(tmp_path: Path) -> None:
    """The same for TextGrids, intervals and frames, and whatever it is called."""
    times = [f"{i / 100:.2f}" for i in range(len(SILENT) + 1)]
    (tmp_path / "a.TextGrid").write_text(textgrid_text(list(zip(times, times[1:], SILENT, strict=False))))
    intervals = [[label, i / 100, (i + 1) / 100] for i, label in enumerate(SILENT)]
    lines = write(tmp_path, {"fileid": "b", "phones": SILENT}, {"fileid": "c", "phones": intervals})
    assert {phone for source in (tmp_path, lines) for row in read_alignments(source).values() for phone in row} == {
        "SIL"
    }
    mine = read_alignments(write(tmp_path, {"fileid": "b", "phones": ["sil", "QUIET", "a"]}), silence=["quiet"])
    assert mine == {"b": ["sil", "SIL", "a"]}


def test_discophons_tables(tmp_path: Path) -> None:
    path = tmp_path / "alignment-deu-dev.txt"
    path.write_text("#file onset offset #phone\na 0.00 0.03 SIL\nb 0.0 0.01 x\na 0.03 0.05 ʃ\n", encoding="utf-8")
    assert read_alignments(path) == {"a": ["SIL"] * 3 + ["ʃ"] * 2, "b": ["x"]}
    path.write_text("#file\tonset\toffset\t#phone\nmy rec.1\t0\t0.02\tx\n\n", encoding="utf-8-sig")
    assert read_alignments(path) == {"my rec.1": ["x", "x"]}
    path.write_text("#file onset offset #phone\na 0.00 x SIL\n")
    with pytest.raises(InputError, match=r"line 2: expected #file onset offset #phone; found 'a 0\.00 x SIL'"):
        read_alignments(path)

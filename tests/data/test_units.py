"""Units in the formats that programs write."""

import gzip
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from helpers.synthetic import write_lines
from spidr.data.units import read_units
from spidr.tools.errors import InputError

EXPECTED = {"x/a": [4, 4, 4, 2], "b": [7]}


@pytest.mark.parametrize(
    "rows",
    [
        [{"fileid": "x/a", "units": [4, 4, 4, 2]}, {"fileid": "b", "units": [7]}],
        [{"name": "x/a", "units": [4, 2], "durations": [3, 1]}, {"name": "b", "units": [7], "durations": [1]}],
        [{"file": "x/a", "units": [4, 4, 4, 2]}, {"file": "b", "units": [7]}],
        [{"file_name": "x/a", "units": [4, 2], "duration": [3, 1]}, {"file_name": "b", "units": [7], "duration": [1]}],
        [{"audio": "x/a", "units": "4 4 4 2", "speaker": "s"}, {"audio": "b", "units": "7", "speaker": "s"}],
        [{"audio": "x/a", "hubert": "4 4 4 2", "duration": 0.08}, {"audio": "b", "hubert": [7], "duration": 0.02}],
        ["{'audio': 'x/a', 'hubert': '4 4 4 2', 'duration': 0.08}", "{'audio': 'b', 'hubert': '7', 'duration': 0.02}"],
        [{"fileid": "x/a", "units": [4.0, 2.0], "durations": [3.0, 1]}, {"fileid": "b", "units": [7.0]}],
        ["x/a|4 4 4 2", "b | 7"],
        ["\ufeffx/a|4 4 4 2", "", "b|7", ""],
    ],
)
def test_lines(tmp_path: Path, rows: list[object]) -> None:
    plain = write_lines(tmp_path / "u.jsonl", *rows)
    packed = tmp_path / "u.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        assert {name: units.tolist() for name, units in read_units(path).items()} == EXPECTED


def test_parquet_and_folders(tmp_path: Path) -> None:
    pl.DataFrame({"fileid": ["x/a", "b"], "units": [[4, 2], [7]], "durations": [[3, 1], [1]]}).write_parquet(
        tmp_path / "u.parquet"
    )
    for name, units in EXPECTED.items():
        file = tmp_path / "folder" / f"{name}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.array(units, np.float32 if name == "b" else np.int16))
    (tmp_path / "folder" / "._a.npy").write_bytes(b"macOS")
    for path in (tmp_path / "u.parquet", tmp_path / "folder"):
        assert {name: units.tolist() for name, units in read_units(path).items()} == EXPECTED
    np.save(tmp_path / "folder" / "c.npy", np.ones((2, 3)))
    with pytest.raises(InputError, match=r"c\.npy: no units of a recording \(float64 of shape \(2, 3\)"):
        read_units(tmp_path / "folder")


def test_lines_without_names(tmp_path: Path) -> None:
    """k-means labels in the order of a manifest, given or (fairseq's) beside the file."""
    path = write_lines(tmp_path / "train.km", "4 4 4 2", "7")
    with pytest.raises(InputError, match=r"train\.km: lines without names; give --manifest, or put train\.tsv"):
        read_units(path)
    assert {name: units.tolist() for name, units in read_units(path, names=["x/a", "b"]).items()} == EXPECTED
    with pytest.raises(InputError, match="2 lines, but 1 recordings in the manifest"):
        read_units(path, names=["a"])
    write_lines(tmp_path / "train.tsv", "/data", "x/a.flac\t1400", "b.flac\t400")
    assert {name: units.tolist() for name, units in read_units(path).items()} == EXPECTED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no units in the file"),
        ("{", "row 1: not JSON"),
        ("{'audio': 'a', 'hubert'", "row 1: not JSON"),
        ("{'audio': 'a', 'hubert': print(1)}", "row 1: not JSON"),
        ("{'audio': " + "[" * 10_000, "row 1: not JSON"),
        ('["a"]', "row 1: expected `fileid` and `units`"),
        ('{"fileid": "a"}', "row 1: expected"),
        ('{"fileid": 3, "units": [1]}', "row 1: expected"),
        ('{"fileid": "a", "units": [1.5]}', "row 1: expected"),
        ('{"fileid": "a", "units": [[1]]}', "row 1: expected"),
        ('{"fileid": "a", "units": [1], "durations": [1, 2]}', "row 1: expected"),
        ('{"fileid": "a", "units": [1], "durations": [-1]}', "row 1: expected"),
        (
            '{"fileid": "a", "units": [1], "durations": [500000000]}',
            "row 1: 500,000,000 units, more than",
        ),
        ('{"fileid": "a", "units": "1 2.5"}', "row 1: expected"),
        ("a|1 x", "row 1: expected"),
        ("1 2 3", "row 1: expected"),
        ('{"fileid": "a", "units": [1]}\n{"name": "a", "units": [1]}', "row 2: 'a' occurs twice"),
    ],
)
def test_bad_units(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "u.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_units(path)

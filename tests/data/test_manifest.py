"""Manifests: formats, types, names and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spidr.data import read_manifest
from spidr.tools.errors import InputError

ROWS = {"fileid": ["0017", "b"], "path": ["/a/0017.wav", "/a/b.wav"], "num_samples": [16_000, 3]}


def test_csv_ignores_further_columns_and_keeps_zeros(tmp_path: Path) -> None:
    file = tmp_path / "m.csv"
    file.write_text("speaker,num_samples,path,fileid\n1,16000,/a/0017.wav,0017\n2,3,/a/b.wav,b\n")
    manifest = read_manifest(file)
    assert manifest.to_dict(as_series=False) == ROWS
    assert manifest.schema == {"fileid": pl.String, "path": pl.String, "num_samples": pl.Int64}


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    rows = [dict(zip(ROWS, values, strict=True)) | {"text": [1]} for values in zip(*ROWS.values(), strict=True)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_manifest(str(file)).to_dict(as_series=False) == ROWS


def test_fairseq(tmp_path: Path) -> None:
    file = tmp_path / "m.tsv"
    file.write_text('/a\nsub/0017.wav\t16000\nb".c.wav\t3\n/elsewhere/noext\t4\n')
    assert read_manifest(file).to_dict(as_series=False) == {
        "fileid": ["0017", 'b".c', "noext"],
        "path": ["/a/sub/0017.wav", '/a/b".c.wav', "/elsewhere/noext"],
        "num_samples": [16_000, 3, 4],
    }


def test_archive_and_statistics_columns(tmp_path: Path) -> None:
    file = tmp_path / "m.csv"
    file.write_text(
        "fileid,path,num_samples,archive,byte_offset,byte_size,mean,std\n"
        "a,a.wav,9,/t.tar,512,62,0.5,0.25\nb,b.wav,9,/t.tar,1536,62,,\nc,/c.wav,9,,,,0,1\n"
    )
    manifest = read_manifest(file)
    assert manifest["byte_offset"].to_list() == [512, 1536, None]
    assert manifest["mean"].to_list() == [0.5, None, 0]
    assert manifest.schema["std"] == pl.Float64


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1))
@settings(max_examples=100, deadline=None)
def test_every_name_survives(names: list[str]) -> None:
    """Polars writes what we read, quotes, line breaks and empty names included."""
    table = pl.DataFrame({"fileid": names, "path": names, "num_samples": range(len(names))})
    for suffix, write in ((".csv", table.write_csv), (".jsonl", table.write_ndjson)):
        file = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / f"spidr-names{suffix}"
        write(file)
        try:
            assert read_manifest(file)["path"].to_list() == names
        finally:
            file.unlink()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "fileid,path\na,b\n", "column 'num_samples' is missing. Columns found: fileid, path"),
        ("m.csv", "fileid,path,num_samples,archive\na,b,1,c\n", "column 'byte_offset' is missing"),
        (
            "m.csv",
            "fileid,path,num_samples\na,b,1\nc,d,long\n",
            "row 2, column 'num_samples': found 'long', expected an i",
        ),
        ("m.csv", "fileid,path,num_samples\na,b,1\nc,d,\n", "row 2, column 'num_samples': found nothing"),
        ("m.csv", "fileid,path,num_samples\na,b,1.5\n", "row 1, column 'num_samples': found 1.5"),
        ("m.csv", "fileid,path,num_samples\na,b,-1\n", "row 1, column 'num_samples': found -1"),
        ("m.csv", "fileid,path,num_samples\na,,1\n", "row 1, column 'path': found nothing, expected a string"),
        ("m.csv", "fileid,path,num_samples\na,b,1,2\n", "row 1 has more values than there are columns"),
        ("m.csv", "fileid,path,num_samples,mean,std\na,b,1,0,-1\n", "row 1, column 'std': found -1"),
        ("m.csv", "fileid,path,num_samples,mean,std\na,b,1,nan,1\n", "row 1, column 'mean': found nan"),
        ("m.csv", "fileid,path,num_samples\n", "has no row"),
        ("m.csv", "", "column 'fileid' is missing. Columns found: none"),
        ("m.jsonl", "", "has no row"),
        ("m.jsonl", '{"fileid": "a", "path": "b"}\n', "column 'num_samples' is missing"),
        (
            "m.jsonl",
            '{"fileid": "a", "path": "b", "num_samples": "4"}\n',
            "row 1, column 'num_samples': found '4', expected",
        ),
        ("m.jsonl", '{"fileid": "a", "path": "b", "num_samples": 4.5}\n', "row 1, column 'num_samples': found 4.5"),
        ("m.jsonl", '{"fileid": "a", "path": "b", "num_samples": 4}\n{"fil', "row 2, column 'fileid': found nothing"),
        ("m.jsonl", "[1]\n", "row 1 is not a JSON object"),
        ("m.jsonl", "{\n", "row 1 is not a line of JSON"),
        ("m.tsv", "/a\nb.wav\n", "row 2 must be"),
        ("m.tsv", "/a\nb.wav\t1\nc.wav\tx\n", "row 3 must be"),
        ("m.tsv", "/a\n", "has no row"),
        ("m.tsv", "b.wav\t1\n", "row 1 must be the root folder"),
        ("m.parquet", "x", "a manifest is a .csv, .jsonl or"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as error:
        read_manifest(file)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_not_text(tmp_path: Path) -> None:
    for name in ("m.csv", "m.jsonl", "m.tsv"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00 fileid,path,num_samples\n")
        with pytest.raises(InputError, match=name):
            read_manifest(tmp_path / name)
    (tmp_path / "m.csv").write_bytes(b"fileid,path,num_samples\na,\xff,1\n")
    with pytest.raises(InputError, match=r"UTF-8|cannot be read: "):
        read_manifest(tmp_path / "m.csv")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_manifest(tmp_path / "m.csv")

"""Manifests: formats, types, names and mistakes."""

import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from spidr.data import read_manifest
from spidr.data.manifest import is_table
from spidr.tools.errors import InputError

ROWS = {"fileid": ["0017", "b"], "path": ["/a/0017.wav", "/a/b.wav"], "num_samples": [16_000, 3]}


def test_csv_keeps_other_columns_and_leading_zeros(tmp_path: Path) -> None:
    file = tmp_path / "m.csv"
    file.write_text("speaker,num_samples,path,fileid\n1,16000,/a/0017.wav,0017\n2,3,/a/b.wav,b\n")
    manifest = read_manifest(file)
    assert manifest.to_dict(as_series=False) == ROWS | {"speaker": [1, 2]}
    assert manifest.columns == ["fileid", "path", "num_samples", "speaker"]
    assert manifest.schema["fileid"] == pl.String
    file.write_text("path,num_samples,age\n" + "/a,1,1\n" * 1500 + "/b,1,old\n")
    assert read_manifest(file)["age"].to_list() == ["1"] * 1500 + ["old"]


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    rows = [dict(zip(ROWS, values, strict=True)) | {"text": [1]} for values in zip(*ROWS.values(), strict=True)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_manifest(str(file)).to_dict(as_series=False) == ROWS | {"text": [[1], [1]]}
    file.write_text('{"fileid": "a", "num_samples": 5, "units": [3, 4]}\n')
    assert read_manifest(file).to_dicts() == [{"fileid": "a", "num_samples": 5, "units": [3, 4]}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.csv", "fileid,path,num_samples\n0017,/a/0017.wav,16000\nb,/a/b.wav,3\n\n"),
        ("m.csv", "\ufefffileid,path,num_samples\r\n0017,/a/0017.wav,16000.0\r\n\r\nb,/a/b.wav, 3 \r\n"),
        ("m.CSV", "path,num_samples\n/a/0017.wav,16000\n/a/b.wav,3\n"),
        ("m.csv", "path\tnum_samples\n/a/0017.wav\t16000\n/a/b.wav\t3\n"),
        ("m.tsv", "path\tnum_samples\n/a/0017.wav\t16000\n/a/b.wav\t3\n"),
        ("m.txt", "num_samples;path\n16000;/a/0017.wav\n3;/a/b.wav\n"),
        ("m.csv", "path, num_samples\n/a/0017.wav, 16000\n  \n/a/b.wav, 3\n"),
        ("m.csv", "fileid , path\t, num_samples\n0017, /a/0017.wav, 16000\nb, /a/b.wav, 3\n"),
        ("m.csv", "path,num_samples\n/a/0017.wav,16000,\n/a/b.wav,3,\n"),
        ("m.tsv", "path\tnum_samples\n/a/0017.wav\t16000\t\n/a/b.wav\t3\t\n"),
        ("m.jsonl", '\ufeff{"path": "/a/0017.wav", "num_samples": 16000.0}\n\n'
                    '{"path": "/a/b.wav", "num_samples": "3"}\n'),
        ("m.json", '{"fileid": "0017", "path": "/a/0017.wav", "num_samples": 16000}\n'
                   '{"fileid": "b", "path": "/a/b.wav", "num_samples": 3}'),
    ],
)  # fmt: skip
def test_tables_as_people_write_them(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_manifest(tmp_path / name).to_dict(as_series=False) == ROWS


def test_quotes_within_values(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text('path,num_samples\n/a/12" mix.wav,5\n"/a/b, ""c"".wav",6\n')
    assert read_manifest(tmp_path / "m.csv")["path"].to_list() == ['/a/12" mix.wav', '/a/b, "c".wav']


def test_columns_that_start_late(tmp_path: Path) -> None:
    """Types come from all rows, so no span, user's column or value of another type is lost."""
    rows = [{"path": f"/{i}.wav", "num_samples": 5, "speaker": 1} for i in range(1500)]
    rows[1400] |= {"start": 1, "end": 2.5, "fileid": "x"}
    rows[1401] |= {"speaker": "f2"}
    rows[1402] |= {"note": "loud", "units": [1, 2]}
    for row in rows:
        row.setdefault("fileid", "y")
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = read_manifest(tmp_path / "m.jsonl")
    assert manifest.row(1400, named=True) == rows[1400] | {
        "num_samples": 24_000, "speaker": "1", "note": None, "units": None
    }  # fmt: skip
    assert manifest["speaker"][1401] == "f2"
    assert manifest.row(1402, named=True)["note"] == "loud"
    assert manifest["units"][1402].to_list() == [1, 2]
    assert manifest["start"].null_count() == 1499


def test_names_that_are_numbers_stay_as_they_are(tmp_path: Path) -> None:
    for number, name in ((2, "2"), (2.5, "2.5"), ("b", "b")):
        rows = [
            {"fileid": 1, "path": "/1.wav", "num_samples": 5},
            {"fileid": number, "path": "/2.wav", "num_samples": 5},
        ]
        (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert read_manifest(tmp_path / "m.jsonl")["fileid"].to_list() == ["1", name]


@pytest.mark.parametrize("name", ["m.tsv", "list.txt"])
def test_fairseq(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text('/a\nsub/0017.wav\t16000.0\nb".c.wav\t3\n/elsewhere/noext\t4\n\n')
    assert read_manifest(file).to_dict(as_series=False) == {
        "fileid": ["sub/0017.wav", 'b".c.wav', "/elsewhere/noext"],
        "path": ["/a/sub/0017.wav", '/a/b".c.wav', "/elsewhere/noext"],
        "num_samples": [16_000, 3, 4],
    }


def test_lists(tmp_path: Path) -> None:
    for name in ("list.txt", "files", "files.lst"):
        (tmp_path / name).write_text('/a/my recording.wav\r\n\n/b/"c".d.flac\n')
        assert is_table(tmp_path / name)
        assert read_manifest(tmp_path / name).to_dict(as_series=False) == {
            "fileid": ["my recording", '"c".d'],
            "path": ["/a/my recording.wav", '/b/"c".d.flac'],
        }
    (tmp_path / "wav.scp").write_text("utt1 /a/my recording.wav\nutt2\t/b/c.flac\n")
    assert read_manifest(tmp_path / "wav.scp").to_dict(as_series=False) == {
        "fileid": ["utt1", "utt2"],
        "path": ["/a/my recording.wav", "/b/c.flac"],
    }
    (tmp_path / "segments").write_text("utt2-1 utt2 0.5 1.75\nutt1-1 utt1 0.00 2\nutt2-2 utt2 1 1.001\n")
    assert read_manifest(tmp_path / "segments").to_dict(as_series=False) == {
        "fileid": ["utt2-1", "utt1-1", "utt2-2"],
        "path": ["/b/c.flac", "/a/my recording.wav", "/b/c.flac"],
        "num_samples": [20_000, 32_000, 16],
        "start": [0.5, 0.0, 1.0],
        "end": [1.75, 2.0, 1.001],
    }
    (tmp_path / "segments").write_text("a utt1 3 -1\n")
    assert read_manifest(tmp_path / "segments").to_dicts() == [
        {"fileid": "a", "path": "/a/my recording.wav", "start": 3.0, "end": None}
    ]
    (tmp_path / "audio").write_bytes(b"RIFF\0\0\0\0WAVE")
    assert not is_table(tmp_path / "audio")
    assert not is_table(tmp_path)


def test_spans_in_tables(tmp_path: Path) -> None:
    """``num_samples`` may be that of the whole recording."""
    (tmp_path / "m.csv").write_text("path,start,end,num_samples\n/a.wav,1,2.5,99999\n/b.wav,,,5\n/c.wav,,1,\n")
    assert read_manifest(tmp_path / "m.csv")["num_samples"].to_list() == [24_000, 5, 16_000]
    (tmp_path / "m.csv").write_text("path,start,num_samples\n/a.wav,1,99999\n")
    assert "num_samples" not in read_manifest(tmp_path / "m.csv").columns


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here/audio/1.wav", "corpus/audio/1.wav", "corpus/audio/2.wav", "corpus/deep/3.wav", "home/4.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CORPUS", str(tmp_path / "corpus"))
    lines = ["audio/1.wav", "audio/2.wav", "deep/3.wav", "~/4.wav", "$CORPUS/deep/3.wav", "gone/5.wav"]
    (tmp_path / "corpus" / "list.txt").write_text("\n".join(lines))
    corpus = tmp_path / "corpus"
    expected = ["audio/1.wav", f"{corpus}/audio/2.wav", f"{corpus}/deep/3.wav", f"{tmp_path}/home/4.wav"]
    expected += [f"{corpus}/deep/3.wav", "gone/5.wav"]
    assert read_manifest("$CORPUS/list.txt")["path"].to_list() == expected
    (corpus / "tar.csv").write_text(
        "path,num_samples,archive,byte_offset,byte_size\ndeep/3.wav,5,audio/2.wav,512,10\naudio/2.wav,5,,,\n"
    )
    manifest = read_manifest(corpus / "tar.csv")
    assert manifest["path"].to_list() == ["deep/3.wav", f"{corpus}/audio/2.wav"]  # a member's name does not change
    assert manifest["archive"].to_list() == [f"{corpus}/audio/2.wav", None]


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


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0$~")), min_size=1))
@settings(max_examples=100, deadline=None)
def test_every_name_survives(names: list[str]) -> None:
    """What polars writes is read back, including quotes, line breaks and empty names."""
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
        ("m.csv", "fileid,text\na,b\n", "column 'num_samples' is missing. Columns found: fileid, text"),
        ("m.csv", "a,num_samples\nb,1\n", "column 'path' is missing. Columns found: a, num_samples"),
        ("m.csv", "path,start,end\na,2,1\n", "row 1: the span ends before it begins"),
        ("m.csv", "path,start,end\na,0,1\nb,-1,1\n", "row 2, column 'start': found '-1', expected seconds, at least 0"),
        ("wav.scp", "a b.wav\nb sox c.wav -t wav - |\n", "row 2 is a command, and commands are not run"),
        ("wav.scp", "a b.wav\nb\n", "row 2 must be `name path`; found 'b'"),
        ("segments", "a b 0 1\na b x 1\n", "row 2 must be `name recording start end`"),
        ("segments", "a b 0 1\n", "wav.scp: cannot be read (No such file"),
        ("m.csv", "fileid,path,num_samples,archive\na,b,1,c\n", "column 'byte_offset' is missing"),
        (
            "m.csv",
            "fileid,path,num_samples\na,b,1\nc,d,long\n",
            "row 2, column 'num_samples': found 'long', expected an i",
        ),
        ("m.csv", "fileid,path,num_samples\na,b,1\nc,d,\n", "row 2, column 'num_samples': found nothing"),
        ("m.csv", "fileid,path,num_samples\na,b,1.5\n", "row 1, column 'num_samples': found '1.5'"),
        ("m.csv", "fileid,path,num_samples\na,b,-1\n", "row 1, column 'num_samples': found '-1'"),
        ("m.csv", "fileid,path,num_samples\na,,1\n", "row 1, column 'path': found nothing, expected a string"),
        ("m.csv", "fileid,path,num_samples\na,b,1,2\n", "row 1 has more values than there are columns"),
        ("m.csv", "fileid,path,num_samples,mean,std\na,b,1,0,-1\n", "row 1, column 'std': found '-1'"),
        ("m.csv", "fileid,path,num_samples,mean,std\na,b,1,nan,1\n", "row 1, column 'mean': found 'nan'"),
        ("m.csv", "fileid,path,num_samples\n", "has no row"),
        ("m.csv", "", "has no row"),
        ("m.txt", "\n \n", "has no row"),
        ("m.jsonl", "", "has no row"),
        ("m.jsonl", '{"fileid": "a", "path": "b", "num_samples": 4.5}\n', "row 1, column 'num_samples': found '4.5'"),
        ("m.jsonl", '{"fileid": "a", "path": "b", "num_samples": 4}\n{"fil', "row 2 is not a line of JSON"),
        ("m.jsonl", "[1]\n", "row 1 is not a JSON object"),
        ("m.jsonl", '{"path": ["a", "b"], "num_samples": 4}\n', r"'path': found \['a', 'b'\], expected a string"),
        ("m.jsonl", "{\n", "row 1 is not a line of JSON"),
        ("m.jsonl", '{"path": "\\ud800", "num_samples": 4}\n{"path": 1, "num_samples": [4]}\n', "not a UTF-8"),
        ("m.tsv", "/a\nb.wav\n", "row 2 must be"),
        ("m.tsv", "/a\nb.wav\t1\nc.wav\tx\n", "row 3 must be"),
        ("m.tsv", "/a\n", "has no row"),
        ("m.tsv", "b.wav\t1\n", "row 1 must be the root folder"),
        ("m.tsv", "$ROOT_/a\nb.wav\t1\n", r"the environment variable \$ROOT_ is not set"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace("|", r"\|")) as error:
        read_manifest(file)
    assert str(error.value).startswith(str(file.parent))
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

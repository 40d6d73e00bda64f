"""Manifests that we write: complete, exact, the same every time, or not there."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from synthetic import noise, write_audio

from spidr.data import read_manifest, speech_dataset
from spidr.data.write_manifest import main, write_manifest, write_manifest_fairseq, write_manifest_tar
from spidr.tools.errors import InputError

NAMES = ["0017.wav", "sub/0017.WAV", 'a "quoted", name.wav', "line\nbreak.wav", "é世.wav", " .wav", "a.b.wav", "-x.wav"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for i, name in enumerate(NAMES):
        write_audio(tmp_path / "corpus" / name, noise(1000 + i, i), format="WAV")
    (tmp_path / "corpus" / "notes.txt").write_text("no recording")
    return tmp_path / "corpus"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_folder(corpus: Path, tmp_path: Path, suffix: str) -> None:
    output = tmp_path / "new folder" / f"m{suffix}"
    write_manifest(corpus, output)
    manifest = read_manifest(output)
    assert manifest["path"].to_list() == sorted(str(corpus / name) for name in NAMES)
    assert dict(zip(manifest["path"], manifest["fileid"], strict=True)) == {
        str(corpus / name): Path(name).stem for name in NAMES
    }
    lengths = {str(corpus / name): 1000 + i for i, name in enumerate(NAMES)}
    assert dict(zip(manifest["path"], manifest["num_samples"], strict=True)) == lengths
    first = output.read_bytes()
    write_manifest(corpus, output)
    assert output.read_bytes() == first
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_several_extensions(tmp_path: Path) -> None:
    for name, kind in (("a.wav", "WAV"), ("b.FLAC", "FLAC"), ("c.ogg", "OGG")):
        write_audio(tmp_path / "corpus" / name, noise(1000, 1), format=kind)
    main([str(tmp_path / "corpus"), str(tmp_path / "m.csv"), "--ext", ".wav", "flac"])
    assert read_manifest(tmp_path / "m.csv")["fileid"].to_list() == ["a", "b"]
    with pytest.raises(InputError, match=r"corpus: no file's name ends in \.mp3 or \.opus\. Choose another extension"):
        write_manifest(tmp_path / "corpus", tmp_path / "n.csv", [".mp3", ".opus"])


def test_relative_folder_gives_absolute_paths(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus.parent)
    write_manifest("corpus", tmp_path / "m.csv")
    assert all(Path(path).is_file() and Path(path).is_absolute() for path in read_manifest(tmp_path / "m.csv")["path"])


def test_archive_is_the_folder(corpus: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "corpus.tar", "w") as tar:
        tar.add(corpus, arcname="")
    write_manifest(corpus, tmp_path / "folder.csv")
    write_manifest_tar(tmp_path / "corpus.tar", tmp_path / "archive.csv")
    folder, archive = (speech_dataset(tmp_path / f"{name}.csv", normalize=False) for name in ("folder", "archive"))
    assert archive.manifest["path"].to_list() == sorted(NAMES)
    assert set(archive.manifest["archive"]) == {str(tmp_path / "corpus.tar")}
    rows = {path.removeprefix(f"{corpus}/"): i for i, path in enumerate(folder.manifest["path"])}
    for i, name in enumerate(sorted(NAMES)):
        assert folder[rows[name]].tolist() == archive[i].tolist()
    (first,) = archive.recordings(np.array([0]))
    assert str(first) == f"{tmp_path}/corpus.tar:{min(NAMES)}"


def test_long_member_names_and_other_kinds_of_members(tmp_path: Path) -> None:
    file = write_audio(tmp_path / "a.wav", noise(500))
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(file, "x" * 300 + ".wav")
        tar.add(tmp_path, "folder.wav", recursive=False)
        link = tarfile.TarInfo("link.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    write_manifest_tar(tmp_path / "t.tar", tmp_path / "m.csv")
    manifest = read_manifest(tmp_path / "m.csv")
    assert manifest["path"].to_list() == ["x" * 300 + ".wav"]
    assert speech_dataset(tmp_path / "m.csv", normalize=False)[0].shape == (500,)


def test_fairseq(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot hold tabs and line breaks"):
        write_manifest_fairseq(corpus, tmp_path / "m.tsv")
    (corpus / "line\nbreak.wav").unlink()
    write_manifest_fairseq(corpus, tmp_path / "m.tsv")
    lines = (tmp_path / "m.tsv").read_text().splitlines()
    assert lines[0] == str(corpus)
    assert "sub/0017.WAV\t1001" in lines
    write_manifest(corpus, tmp_path / "m.csv")
    assert read_manifest(tmp_path / "m.tsv").equals(read_manifest(tmp_path / "m.csv"))


def test_statistics(corpus: Path, tmp_path: Path) -> None:
    write_manifest(corpus, tmp_path / "m.csv", stats=True)
    manifest = read_manifest(tmp_path / "m.csv")
    dataset = speech_dataset(tmp_path / "m.csv", normalize=False)
    for i, (mean, std) in enumerate(manifest.select("mean", "std").iter_rows()):
        samples = dataset[i].numpy().astype(np.float64)
        assert (mean, std) == pytest.approx((samples.mean(), samples.std()), rel=1e-5)


def test_order_is_kept_over_many_files(tmp_path: Path, recordings: Callable[..., Path]) -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 700).tolist()
    assert read_manifest(recordings(lengths))["num_samples"].to_list() == lengths


def test_one_bad_recording_and_nothing_is_written(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "m.csv"
    write_manifest(corpus, output)
    before = output.read_bytes()
    write_audio(corpus / "sub" / "8k.wav", noise(100), 8000)
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(corpus, arcname="c")
    for write, dataset in ((write_manifest, corpus), (write_manifest_tar, tmp_path / "t.tar")):
        with pytest.raises(InputError, match=r"sub/8k.wav: the sample rate is 8000 Hz"):
            write(dataset, output)
    assert output.read_bytes() == before
    assert list(output.parent.iterdir()) == [output]


def test_bad_arguments(corpus: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz") as tar:
        tar.add(corpus)
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(corpus)
    (tmp_path / "cut.tar").write_bytes((tmp_path / "t.tar").read_bytes()[:3000])
    damaged = bytearray((tmp_path / "t.tar").read_bytes())
    with tarfile.open(tmp_path / "t.tar") as tar:
        damaged[tar.getmembers()[3].offset + 150] ^= 1  # in its checksum
    (tmp_path / "damaged.tar").write_bytes(damaged)
    (tmp_path / "text.tar").write_text("no archive " * 100)
    (tmp_path / "t.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.csv").mkdir()
    csv = tmp_path / "m.csv"
    for write, dataset, output, message in (
        (write_manifest, tmp_path / "gone", csv, "gone: not a folder"),
        (write_manifest, tmp_path / "empty", csv, r"empty: no file's name ends in \.wav"),
        (write_manifest, corpus, tmp_path / "m.txt", r"m\.txt: the manifest's name must end in \.csv or \.jsonl"),
        (write_manifest, corpus, tmp_path / "folder.csv", "is a folder"),
        (write_manifest, corpus, corpus / "notes.txt" / "m.csv", "cannot be made"),
        (write_manifest_fairseq, corpus, csv, r"must end in \.tsv"),
        (write_manifest_tar, tmp_path / "t.tar.gz", csv, r"t\.tar\.gz: a compressed archive; decompress it"),
        (write_manifest_tar, tmp_path / "t.tar.zst", csv, r"t\.tar\.zst: a compressed archive; decompress it"),
        (write_manifest_tar, tmp_path / "cut.tar", csv, r"cut\.tar: not a complete tar archive"),
        (write_manifest_tar, tmp_path / "damaged.tar", csv, r"damaged\.tar: damaged after byte"),
        (write_manifest_tar, tmp_path / "text.tar", csv, "not a complete tar archive"),
        (write_manifest_tar, tmp_path / "gone.tar", csv, r"gone\.tar: does not exist; expected a folder or a \.tar"),
    ):
        with pytest.raises(InputError, match=message):
            write(dataset, output)
        assert not csv.exists()
    with pytest.raises(InputError, match=r"no file in it has a name that ends in \.flac"):
        write_manifest_tar(tmp_path / "t.tar", csv, "flac")


def test_names_that_are_no_text(tmp_path: Path) -> None:
    file = write_audio(tmp_path / "corpus" / "a.wav", noise(100))
    file.rename(Path(f"{tmp_path}/corpus/\udcff.wav"))
    with pytest.raises(InputError, match="not valid UTF-8") as error:
        write_manifest(tmp_path / "corpus", tmp_path / "m.csv")
    str(error.value).encode()


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spidr.data.write_manifest", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_line(corpus: Path, tmp_path: Path) -> None:
    done = run(corpus, tmp_path / "m.jsonl", "--ext", "wav", "--stats")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "std" in read_manifest(tmp_path / "m.jsonl").columns
    done = run(corpus, tmp_path / "m.csv", "--ext", ".flac")
    assert done.returncode == 2
    assert done.stderr == f"error: {corpus}: no file's name ends in .flac. Choose another extension with --ext.\n"
    assert not (tmp_path / "m.csv").exists()


def test_command_line_for_archives_and_fairseq(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / "line\nbreak.wav").unlink()
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(corpus)
    main([str(tmp_path / "t.tar"), str(tmp_path / "m.csv")])
    assert read_manifest(tmp_path / "m.csv").height == len(NAMES) - 1
    main([str(corpus), str(tmp_path / "m.tsv"), "--fairseq"])
    assert read_manifest(tmp_path / "m.tsv").height == len(NAMES) - 1
    for wrong in ([str(tmp_path / "t.tar"), "m.tsv", "--fairseq"], [str(corpus), "m.tsv", "--fairseq", "--stats"]):
        with pytest.raises(SystemExit) as exit_status:
            main(wrong)
        assert exit_status.value.code == 2
        assert "--fairseq is for folders" in capsys.readouterr().err

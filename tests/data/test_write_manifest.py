"""Written manifests are complete, exact and deterministic, or absent."""

import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers.synthetic import noise, write_audio
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
    fileids = {str(corpus / name): Path(name).stem for name in NAMES} | {str(corpus / "sub/0017.WAV"): "sub/0017"}
    assert dict(zip(manifest["path"], manifest["fileid"], strict=True)) == fileids
    lengths = {str(corpus / name): 1000 + i for i, name in enumerate(NAMES)}
    assert dict(zip(manifest["path"], manifest["num_samples"], strict=True)) == lengths
    first = output.read_bytes()
    write_manifest(corpus, output)
    assert output.read_bytes() == first
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_several_extensions(tmp_path: Path) -> None:
    for name, kind in (("a.wav", "WAV"), ("b.FLAC", "FLAC"), ("c.ogg", "OGG")):
        write_audio(tmp_path / "corpus" / name, noise(1000, 1), format=kind)
    corpus, output = str(tmp_path / "corpus"), str(tmp_path / "m.csv")
    for arguments in (
        [corpus, output, "--ext", ".wav", "flac"],
        ["--ext", ".wav", ".flac", corpus, output, "--stats"],
        ["--ext", "wav", "flac", corpus, output],
        [corpus, "--ext", ".wav", "--ext=.flac", output],
    ):
        assert main(arguments) == 0
        assert read_manifest(output)["fileid"].to_list() == ["a", "b"]
        Path(output).unlink()
    assert main(["--ext", ".flac", corpus, output]) == 0
    assert main(["--ext", "b.flac", corpus, output]) == 0
    assert main(["--ext", "x.flac", corpus, output]) == 2
    with pytest.raises(
        InputError, match=r"corpus: no file's name ends in \.mp3 or \.opus\..*\(there are 1 .wav, 1 .flac, 1 .ogg\)"
    ):
        write_manifest(tmp_path / "corpus", tmp_path / "n.csv", [".mp3", ".opus"])


def test_without_semaphores(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers where /dev/shm is not writable."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    write_manifest(corpus, tmp_path / "m.csv")
    assert len(read_manifest(tmp_path / "m.csv")) == len(NAMES)


def test_relative_folder_gives_absolute_paths(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus.parent)
    write_manifest("corpus", tmp_path / "m.csv")
    assert all(Path(path).is_file() and Path(path).is_absolute() for path in read_manifest(tmp_path / "m.csv")["path"])


def test_an_archive_equals_its_folder(corpus: Path, tmp_path: Path) -> None:
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
    fairseq, csv = read_manifest(tmp_path / "m.tsv"), read_manifest(tmp_path / "m.csv")
    assert fairseq.drop("fileid").equals(csv.drop("fileid"))
    assert fairseq["fileid"].to_list() == [path.removeprefix(f"{corpus}/") for path in csv["path"]]


def test_statistics(corpus: Path, tmp_path: Path) -> None:
    write_manifest(corpus, tmp_path / "m.csv", stats=True)
    manifest = read_manifest(tmp_path / "m.csv")
    dataset = speech_dataset(tmp_path / "m.csv", normalize=False)
    for i, (mean, std) in enumerate(manifest.select("mean", "std").iter_rows()):
        samples = dataset[i].numpy().astype(np.float64)
        assert (mean, std) == pytest.approx((samples.mean(), samples.std()), rel=1e-5)


def test_many_files_keep_their_order(tmp_path: Path, recordings: Callable[..., Path]) -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 700).tolist()
    assert read_manifest(recordings(lengths))["num_samples"].to_list() == lengths


def test_all_problems_are_reported_at_once_or_skipped(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {
        "empty.wav": b"",
        "text.wav": b"no recording",
        "8k.wav": write_audio(tmp_path / "x.wav", noise(100), 8000).read_bytes(),
        "stereo.wav": write_audio(tmp_path / "x.wav", np.stack([noise(9), noise(9)], 1)).read_bytes(),
    }
    for name, data in bad.items():
        (corpus / name).write_bytes(data)
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(corpus, arcname="c")
    for dataset, place in ((corpus, f"{corpus}/"), (tmp_path / "t.tar", f"{tmp_path}/t.tar:c/")):
        output = tmp_path / "m.csv"
        assert main([str(dataset), str(output)]) == 2
        said = capsys.readouterr().err
        assert said.endswith("\n4 of 12 recordings cannot be read; --on-error skip leaves them out.\n")
        assert all(f"{place}{name}: " in said for name in bad)
        assert not output.exists()
        assert main([str(dataset), str(output), "--on-error", "skip"]) == 0
        said = capsys.readouterr().err
        assert "8 recordings" in said and "left out, because they cannot be read: 4\n" in said  # noqa: PT018
        assert all(f"  {place}{name}: " in said for name in bad)
        assert read_manifest(output).height == len(NAMES)
        output.unlink()


def test_archives_joined_in_folders_and_several_at_once(tmp_path: Path) -> None:
    files = [write_audio(tmp_path / "audio" / f"{i}.wav", noise(1000 + i)) for i in range(6)]
    (tmp_path / "audio" / "._0.wav").write_bytes(b"\0\5\26\7")
    shards = [tmp_path / "shards" / f"{i}.tar" for i in range(3)]
    shards[0].parent.mkdir()
    for i, shard in enumerate(shards):
        with tarfile.open(shard, "w") as tar:
            for file in files[2 * i : 2 * i + 2]:
                tar.add(file, f"audio/{file.name}")
                tar.add(tmp_path / "audio" / "._0.wav", "audio/._0.wav")
    (tmp_path / "joined.tar").write_bytes(b"".join(shard.read_bytes() for shard in shards))
    for sources in ([tmp_path / "joined.tar"], [tmp_path / "shards"], shards, [*shards[:2], *files[4:]]):
        assert main([*map(str, sources), str(tmp_path / "m.csv")]) == 0
        dataset = speech_dataset(tmp_path / "m.csv", normalize=False)
        assert dataset.manifest["fileid"].to_list() == [str(i) for i in range(6)]
        assert [len(dataset[i]) for i in range(6)] == [1000 + i for i in range(6)]
    with (tmp_path / "joined.tar").open("ab") as tar:
        tar.write(b"no archive" * 100)
    with pytest.raises(InputError, match="damaged after byte"):
        write_manifest_tar(tmp_path / "joined.tar", tmp_path / "n.csv")


def test_names_are_unique(tmp_path: Path) -> None:
    for name in ("timit/FCJF0/SA1.WAV", "timit/MDAB0/SA1.WAV", "timit/MDAB0/SA2.WAV", "other/MDAB0/SA1.WAV"):
        write_audio(tmp_path / name, noise(500), format="NIST")
    write_manifest(tmp_path / "timit", tmp_path / "m.csv")
    assert read_manifest(tmp_path / "m.csv")["fileid"].to_list() == ["FCJF0/SA1", "MDAB0/SA1", "SA2"]
    write_manifest([tmp_path / "timit", tmp_path / "other"], tmp_path / "m.csv")
    fileids = read_manifest(tmp_path / "m.csv")["fileid"].to_list()
    assert fileids == ["FCJF0/SA1", f"{tmp_path}/timit/MDAB0/SA1.WAV"[1:], "SA2", f"{tmp_path}/other/MDAB0/SA1.WAV"[1:]]


def test_lists_get_lengths_and_keep_their_names(tmp_path: Path) -> None:
    files = [write_audio(tmp_path / f"{i}.wav", noise(16_000 + i)) for i in range(2)]
    (tmp_path / "wav.scp").write_text("".join(f"utt{i} {file}\n" for i, file in enumerate(files)))
    (tmp_path / "segments").write_text("b utt1 0.25 0.5\na utt0 0.5 -1\n")
    (tmp_path / "list.txt").write_text("0.wav\n1.wav\n")
    for name, fileids, lengths in (
        ("wav.scp", ["utt0", "utt1"], [16_000, 16_001]),
        ("segments", ["b", "a"], [4000, 8000]),
        ("list.txt", ["0", "1"], [16_000, 16_001]),
    ):
        write_manifest(tmp_path / name, tmp_path / "m.csv")
        dataset = speech_dataset(tmp_path / "m.csv", normalize=False)
        assert dataset.manifest["fileid"].to_list() == fileids
        assert dataset.manifest["num_samples"].to_list() == [len(dataset[i]) for i in range(2)] == lengths


def test_linked_folders_and_second_names(tmp_path: Path) -> None:
    file = write_audio(tmp_path / "store" / "a.wav", noise(500))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "fr").symlink_to(tmp_path / "store")
    (tmp_path / "corpus" / "b.wav").symlink_to(file)
    (tmp_path / "corpus" / "loop").symlink_to(tmp_path / "corpus")
    write_manifest(tmp_path / "corpus", tmp_path / "m.csv")
    assert read_manifest(tmp_path / "m.csv")["fileid"].to_list() == ["b", "a"]


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
        damaged[tar.getmembers()[3].offset + 150] ^= 1  # damages its checksum
    (tmp_path / "damaged.tar").write_bytes(damaged)
    (tmp_path / "text.tar").write_text("no archive " * 100)
    (tmp_path / "t.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.csv").mkdir()
    csv = tmp_path / "m.csv"
    for write, dataset, output, message in (
        (write_manifest, tmp_path / "gone", csv, "gone: does not exist; expected a folder, a .tar or a list"),
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
        (write_manifest_tar, tmp_path / "gone.tar", csv, r"gone\.tar: does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            write(dataset, output)
        assert not csv.exists()
    with pytest.raises(InputError, match=r"no file in it has a name that ends in \.flac"):
        write_manifest_tar(tmp_path / "t.tar", csv, "flac")


def test_names_that_are_not_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_audio(tmp_path / "corpus" / "a.wav", noise(100))
    Path(f"{tmp_path}/corpus/\udcff.wav").write_bytes(file.read_bytes())
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(tmp_path / "corpus", arcname="c")
    for dataset in (tmp_path / "corpus", tmp_path / "t.tar"):
        with pytest.raises(InputError, match=r"udcff.wav': the name is not valid UTF-8; rename the file.\n1 of 2 rec"):
            write_manifest(dataset, tmp_path / "m.csv")
        assert main([str(dataset), str(tmp_path / "m.csv"), "--on-error", "skip"]) == 0
        assert "the name is not valid UTF-8" in capsys.readouterr().err
        assert read_manifest(tmp_path / "m.csv")["fileid"].to_list() == ["a"]
    file.unlink()
    with pytest.raises(InputError, match="1 of 1 recordings cannot be read"):
        write_manifest(tmp_path / "corpus", tmp_path / "m.csv", on_error="skip")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spidr.data.write_manifest", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_line(corpus: Path, tmp_path: Path) -> None:
    done = run(corpus, tmp_path / "m.jsonl", "--ext", "wav", "--stats")
    assert (done.returncode, done.stdout) == (0, "")
    first, second = done.stderr.splitlines()
    assert first == f"{tmp_path}/m.jsonl: 8 recordings, 0.01 min (each 0.06 s to 0.06 s)"
    assert second.startswith("With the default settings of [data], 100 % of the recordings are left out: shorter than")
    assert "std" in read_manifest(tmp_path / "m.jsonl").columns
    done = run(corpus, tmp_path / "m.csv", "--ext", ".flac")
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: {corpus}: no file's name ends in .flac. Choose another extension with --ext (there are 8 .wav).\n"
    )
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
        assert "--fairseq is for one folder" in capsys.readouterr().err

"""Hostile files: nothing in them runs, nothing is written outside, and they get no more memory than other files.

Tests that need a limit of memory or time run in their own process.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from helpers.memory import PEAK
from helpers.small_models import tiny_model
from helpers.tiny_run import write_config, write_recordings
from spidr.config import read_config
from spidr.data import read_manifest
from spidr.data.alignments import read_alignments
from spidr.data.audio import num_samples, read_audio
from spidr.data.units import read_units
from spidr.data.write_manifest import write_manifest, write_manifest_tar
from spidr.evaluate import FeatureFolder
from spidr.extract import Options, extract_features
from spidr.extract.kmeans import KMeans
from spidr.models.fairseq import load_fairseq_weights
from spidr.models.hub import load_weights
from spidr.tools.errors import InputError
from spidr.tools.files import atomic_write


class Harm:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_pickles_run_nothing(tmp_path: Path) -> None:
    harm, mark = Harm(tmp_path / "executed"), tmp_path / "executed"
    torch.save({"model": {"_ema": {}, "x": harm}}, tmp_path / "zip.pt")
    torch.save({"model": {"x": harm}}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"model": harm}))
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "a.pt").write_bytes((tmp_path / "zip.pt").read_bytes())
    np.save(tmp_path / "features" / "b.npy", np.array([harm], dtype=object))
    np.savez(tmp_path / "k.npz", centroids=np.array([harm], dtype=object), made=np.array([harm], dtype=object))
    reads = [
        (lambda p=tmp_path / f"{n}.pt", f=f: f(p))
        for n in ("zip", "legacy", "bare")
        for f in (load_weights, load_fairseq_weights)
    ]
    folder = FeatureFolder(tmp_path / "features")
    for read in [*reads, lambda: folder["a"], lambda: folder["b"], lambda: KMeans.load(tmp_path / "k.npz")]:
        with pytest.raises(InputError):
            read()
    assert not mark.exists()
    os.system(f"touch {mark}")  # what they would do
    assert mark.exists()


def test_text_nested_ten_thousand_deep(tmp_path: Path) -> None:
    deep = "[" * 10_000 + "]" * 10_000
    for name, text in {
        "list.toml": f"a = {deep}", "table.toml": "a = " + "{a=" * 10_000 + "1" + "}" * 10_000,
        "key.toml": "a" + ".a" * 10_000 + " = 1", "quoted.toml": '"#"' + '."#"' * 10_000 + " = 1",
        "header.toml": "[a" + ".a" * 10_000 + "]", "list.json": deep,
        "table.json": '{"a":' * 10_000 + "1" + "}" * 10_000,
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=f"{name}: not valid (TOML|JSON): nested too deeply"):
            read_config(tmp_path / name)
    for read, name in ((read_alignments, "a.jsonl"), (read_units, "u.jsonl"), (read_manifest, "m.jsonl")):
        (tmp_path / name).write_text(f'{{"fileid": {deep}}}\n')
        with pytest.raises(InputError, match=name):
            read(tmp_path / name)


# --------------------------------------------------------------------------------------------------------------------
# Memory

LIMITED = (
    PEAK
    + """
import sys
import numpy, polars, torch
from spidr.tools.errors import InputError
from spidr.data.alignments import read_alignments
from spidr.data.audio import read_audio
from spidr.data.units import read_units
from spidr.extract.kmeans import KMeans
from spidr.models.fairseq import load_fairseq_weights
from spidr.models.hub import load_weights
for name in sys.argv[1:]:
    function, _, path = name.partition("=")
    used = peak()
    try:
        globals()[function.replace("KMeans", "load")](path) if function != "KMeans" else KMeans.load(path)
        outcome = "read"
    except InputError as error:
        outcome = "refused"
        assert Path(path).name in str(error), error
    grown = (peak() - used) / 1024
    print(function, Path(path).name, outcome, round(grown), flush=True)
"""
)


def outcomes(*reads: tuple[str, Path]) -> list[tuple[str, int]]:
    """The results of reading files in a process, and by how many MiB its peak memory grew."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *(f"{function}={path}" for function, path in reads)],
        capture_output=True, text=True, timeout=250, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == len(reads)
    return [(row[2], int(row[3])) for row in rows]


def test_bombs(tmp_path: Path) -> None:
    """Files of a few hundred kilobytes that claim, or expand to, gigabytes. The FLAC's real samples are read."""
    with gzip.open(tmp_path / "line.jsonl.gz", "wb", 1) as file:
        for _ in range(128):
            file.write(b" " * (1 << 20))
    (tmp_path / "long.jsonl").write_text('{"fileid": "a", "phones": [["a", 0, 1e9]]}\n')
    day = "".join(f'{{"fileid": "{i}", "phones": [["a", 0, 1e5]]}}\n' for i in range(1000))
    (tmp_path / "days.jsonl").write_text(day)
    (tmp_path / "runs.jsonl").write_text('{"fileid": "a", "units": [1], "durations": [1000000000000]}\n')
    zeros = np.zeros((1 << 17, 512), np.float32)  # 256 MiB
    np.savez_compressed(tmp_path / "k.npz", centroids=zeros, made="{}")
    torch.save({"model": {"x": torch.zeros(100_000)}}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain:
        entries = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(tmp_path / "zip.pt", "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(name, zeros.tobytes() if "/data/" in name else content)
    (tmp_path / "overlap.pt").write_bytes(overlapping(tmp_path / "plain.pt"))
    put = b"\x80\x02}X\x05\0\0\0model}r" + struct.pack("<I", 1 << 27) + b"s."  # memo index 2^27
    with zipfile.ZipFile(tmp_path / "put.pt", "w") as file:
        file.writestr("a/data.pkl", put)
    (tmp_path / "old.pt").write_bytes(old_format({"model": Zeros(3_000_000_000)}))
    (tmp_path / "promise.flac").write_bytes(promising_flac())
    reads = [
        ("read_alignments", "line.jsonl.gz"), ("read_units", "line.jsonl.gz"), ("read_alignments", "long.jsonl"),
        ("read_alignments", "days.jsonl"), ("read_units", "runs.jsonl"), ("KMeans", "k.npz"),
        ("load_weights", "zip.pt"),
        ("load_fairseq_weights", "zip.pt"), ("load_weights", "overlap.pt"), ("load_fairseq_weights", "put.pt"),
        ("load_weights", "old.pt"),
        ("read_audio", "promise.flac"),
    ]  # fmt: skip
    for (function, name), (outcome, grown) in zip(reads, outcomes(*((f, tmp_path / n) for f, n in reads)), strict=True):
        assert outcome == ("read" if name == "promise.flac" else "refused"), (function, name)
        assert grown < 200, (function, name, grown)


class Zeros:
    """Becomes this many bytes when unpickled."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __reduce__(self) -> Any:
        return bytearray, (self.size,)


def old_format(document: Any) -> bytes:
    """A file of torch before 1.6, without a storage."""
    system = {"protocol_version": 1001, "little_endian": sys.byteorder == "little", "type_sizes": {}}
    parts = (torch.serialization.MAGIC_NUMBER, 1001, system, document, [])
    return b"".join(pickle.dumps(part, protocol=2) for part in parts)


def overlapping(plain: Path) -> bytes:
    """An archive whose directory lists every entry two hundred times."""
    content = plain.read_bytes()
    end = content.rindex(b"PK\5\6")
    size, begin = struct.unpack_from("<II", content, end + 12)
    table = content[begin : begin + size] * 200
    count = struct.unpack_from("<H", content, end + 10)[0] * 200
    return content[:begin] + table + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, len(table), begin, 0)


def promising_flac() -> bytes:
    """A quarter of a second that claims to be 50 days."""
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).standard_normal(4000) * 0.1, 16_000, format="FLAC")
    content = bytearray(file.getvalue())
    content[21] |= 0x0F
    content[22] = 0xFF
    return bytes(content)


def test_expanded_tensors(tmp_path: Path) -> None:
    """A tensor whose rows all share a few bytes would take terabytes when copied."""
    torch.save({"model": {"x": torch.zeros(1).expand(1 << 40)}}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt: .*larger than its data at x"):
        load_weights(tmp_path / "x.pt")


# --------------------------------------------------------------------------------------------------------------------
# Archives


def wav(samples: int = 800) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(samples), 16_000, format="WAV", subtype="PCM_16")
    return file.getvalue()


def member(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, content


def pack(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def test_names_that_point_outside(tmp_path: Path) -> None:
    """Members and rows with any name are encoded, into files inside the output only."""
    names = ["../../up.wav", "/abs/x.wav", "a/../../../y.wav", "../../up.wav", "z.wav"]
    tar = pack(tmp_path / "t.tar", *(member(name, wav()) for name in names))
    write_manifest_tar(tar, tmp_path / "t.csv")
    audio = tmp_path / "audio.wav"
    audio.write_bytes(wav())
    (tmp_path / "m.csv").write_text(f"fileid,path,num_samples\n../../evil,{audio},800\n")
    for number, (manifest, flat) in enumerate([("t.csv", False), ("t.csv", True), ("m.csv", True)]):
        output = tmp_path / "deep" / "er" / str(number)
        before = {p for p in tmp_path.rglob("*") if output not in p.parents}
        extract_features(
            tmp_path / manifest,
            output,
            model=tiny_model(),
            layer=2,
            flat=flat,
            options=Options(progress=False, device="cpu"),
        )
        after = {p for p in tmp_path.rglob("*") if output not in p.parents}
        assert after - before <= {output, *output.parents}
        assert len(list(output.rglob("*.npy"))) == (1 if manifest == "m.csv" else len(names))


def test_links_are_not_recordings(tmp_path: Path) -> None:
    links = (member(f"{kind!r}.wav", kind=kind, link="/etc/passwd") for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE))
    others = (member(f"{kind!r}.wav", kind=kind) for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE))
    tar = pack(tmp_path / "t.tar", *links, *others, member("a.wav", wav()))
    write_manifest_tar(tar, tmp_path / "m.csv")
    assert read_manifest(tmp_path / "m.csv")["path"].to_list() == ["a.wav"]


def with_size(content: bytes, at: int, size: int) -> bytes:
    """An archive in which the header at ``at`` states another size."""
    header = bytearray(content[at : at + 512])
    header[124:136] = bytes([0x80 if size >= 0 else 0xFF]) + (size % (1 << 88)).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + content[at + 512 :]


@pytest.mark.parametrize("size", [-(1 << 40), -512, -1024, 1 << 30, 1 << 62, 1 << 80])
@pytest.mark.parametrize("name", ["a.wav", "a.txt", "n" * 150 + ".wav"])
def test_sizes_that_lie(tmp_path: Path, name: str, size: int) -> None:
    """Also the size of a long name before a header, and sizes that point backwards."""
    tar = pack(tmp_path / "t.tar", member("0.wav", wav()), member(name, wav()), member("z.wav", wav()))
    second = 512 * (1 + (len(wav()) + 511) // 512)
    tar.write_bytes(with_size(tar.read_bytes(), second, size))
    with pytest.raises(InputError, match=r"t\.tar"):
        write_manifest_tar(tar, tmp_path / "m.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["t.tar"]


@pytest.mark.parametrize("digits", [25, 5000])
def test_huge_lengths_of_extended_headers(tmp_path: Path, digits: int) -> None:
    extended = member("x", b"9" * digits + b" path=x\n", kind=tarfile.XHDTYPE)
    tar = pack(tmp_path / "t.tar", extended, member("a.wav", wav()))
    with pytest.raises(InputError, match=r"t\.tar: not a complete tar archive"):
        write_manifest_tar(tar, tmp_path / "m.csv")


def test_sparse_members(tmp_path: Path) -> None:
    tar = pack(tmp_path / "t.tar", member("a.wav", wav(), kind=tarfile.GNUTYPE_SPARSE))
    with pytest.raises(InputError, match=r"t\.tar"):
        write_manifest_tar(tar, tmp_path / "m.csv")


# --------------------------------------------------------------------------------------------------------------------
# Special files and links


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.wav", "b.flac", "c.mp3"):
        os.mkfifo(tmp_path / name)
        for read in (num_samples, read_audio):
            with pytest.raises(InputError, match=f"{name}: cannot be read .it is a pipe"):
                read(tmp_path / name)
    with pytest.raises(InputError, match=r"a\.wav: cannot be read .it is a pipe"):
        write_manifest(tmp_path, tmp_path / "m.csv")
    with pytest.raises(InputError, match="it is a pipe"):
        write_manifest_tar(tmp_path / "a.wav", tmp_path / "m.csv")


def test_patterns_are_names(tmp_path: Path) -> None:
    """A manifest called ``*.csv`` is that file, not a pattern."""
    row = "fileid,path,num_samples\n{0},/{0}.wav,1\n"
    for name in ("*", "a", "b[1]"):
        (tmp_path / f"{name}.csv").write_text(row.format(name))
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"fileid": name, "path": "/x", "num_samples": 1}))
        (tmp_path / f"{name}.tsv").write_text(f"/\n{name}.wav\t1\n")
    for name in ("*", "a", "b[1]"):
        for suffix in ("csv", "jsonl", "tsv"):
            fileids = read_manifest(tmp_path / f"{name}.{suffix}")["fileid"].to_list()
            assert fileids == [f"{name}.wav" if suffix == "tsv" else name]


def test_a_link_at_the_place_of_a_file_is_replaced(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "x.json").symlink_to(victim)
    with atomic_write(tmp_path / "x.json") as file:
        file.write(b"new")
    assert victim.read_text() == "precious"
    assert (tmp_path / "x.json").read_text() == "new"
    assert not (tmp_path / "x.json").is_symlink()


def test_linked_run_folder(tmp_path: Path) -> None:
    """A run folder may be a link to another disk; two configurations that share it are detected."""
    from spidr.__main__ import main
    from spidr.train import train

    manifest = write_recordings(tmp_path / "data", count=6)
    room = tmp_path / "room"
    room.mkdir()
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "run").symlink_to(room)
    config = write_config(
        tmp_path, manifest, optimizer={"max_steps": 1}, validation={"dev": {"manifest": str(manifest)}}
    )
    train(read_config(config))
    assert (tmp_path / "p" / "run").is_symlink()
    assert (room / "final.pt").is_file()
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["run"]
    (tmp_path / "p" / "other").symlink_to(room)
    assert main([str(config), str(write_config(tmp_path, manifest, name="other")), "--dry-run"]) == 2

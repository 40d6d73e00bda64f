"""Which recordings are encoded, and their names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from helpers.extraction import LAYER, QUIET, noise, read, rows, units
from spidr.data import audio
from spidr.data.write_manifest import write_manifest, write_manifest_fairseq, write_manifest_tar
from spidr.extract import Options, extract_features, extract_units, fit_kmeans, session, sources
from spidr.extract.__main__ import main
from spidr.models import DinoSR, num_frames
from spidr.tools.errors import InputError


def test_every_kind_of_source(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    lengths = {"a": 8000, "b/c": 9000, "b/d": 4000}
    for name, samples in lengths.items():
        noise(folder / f"{name}.wav", samples)
    (folder / "notes.txt").write_text("no recording")
    write_manifest(folder, tmp_path / "m.csv")
    write_manifest(folder, tmp_path / "m.jsonl")
    write_manifest_fairseq(folder, tmp_path / "m.tsv")
    subprocess.run(["tar", "-cf", tmp_path / "t.tar", "-C", folder, "a.wav", "b"], check=True)
    write_manifest_tar(tmp_path / "t.tar", tmp_path / "tar.csv")
    files = [folder / f"{name}.wav" for name in lengths]
    cases: dict[str, Any] = {name: tmp_path / name for name in ("corpus", "m.csv", "m.jsonl", "m.tsv", "tar.csv")}
    for name, source in {**cases, "files": files, "some twice": [folder / "b", folder / "a.wav", *files]}.items():
        out = tmp_path / f"units of {name}.jsonl"
        assert extract_units(source, out, model=checkpoint, layer=LAYER, options=QUIET) == {}
        found = rows(out)
        assert sorted(found) == ["a", "c", "d"]
        record = json.loads(out.with_name(f"{out.name}.json").read_text())
        frames = {Path(file).stem: num_frames(samples) for file, samples in lengths.items()}
        assert record["frame_seconds"] == 0.02
        assert {name: len(row["units"]) for name, row in found.items()} == frames
    for name, source in cases.items():
        extract_features(source, tmp_path / "features" / name, model=checkpoint, layer=LAYER, options=QUIET)
        tree = {str(p.relative_to(tmp_path / "features" / name)) for p in (tmp_path / "features" / name).rglob("*.npy")}
        assert tree == {"a.npy", "b/c.npy", "b/d.npy"}


def test_names_never_collide(checkpoint: Path, tmp_path: Path) -> None:
    for i, name in enumerate(("x/a.wav", "x/a.flac", "y/a.wav", "x/a.wav.flac", "x/y/a.wav")):
        noise(tmp_path / name, 4000 + 100 * i)
    for given in (["x"], ["x", "y"], ["x/a.wav", "y/a.wav"], ["x/a.wav", "x/y"], ["y", "x/y", "x"]):
        paths = [tmp_path / name for name in given]
        for tree in (True, False):
            items = sources.name_items(sources.find_items(paths), {}, tree=tree)
            files = {file for path in paths for file in ([path] if path.is_file() else path.rglob("*.*"))}
            assert {item.recording.path for item in items} == {str(file) for file in files}
            assert len({item.name for item in items}) == len(items)
            assert not any(Path(item.name).is_absolute() or ".." in item.name.split("/") for item in items)
    out = tmp_path / "out"
    extract_features([tmp_path / "x", tmp_path / "y"], out, model=checkpoint, layer=LAYER, options=QUIET)
    assert len(list(out.rglob("*.npy"))) == 5


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_resampling_keeps_the_band_below_half_the_rate(rate: int, tmp_path: Path) -> None:
    at, to = np.arange(2 * rate) / rate, np.arange(32_000) / 16_000
    kept = (300, 1000, 3000) if rate == 8000 else (300, 1000, 6000)
    lost = 0.2 * np.sin(2 * np.pi * 10_000 * at) if rate > 20_000 else 0.0  # would alias to 6000 Hz
    sound = lost + sum(0.1 * np.sin(2 * np.pi * f * at) for f in kept)
    soundfile.write(tmp_path / "a.wav", np.stack([sound, sound], 1), rate, subtype="FLOAT")
    (item,), _ = sources.find_lengths(sources.find_items(tmp_path / "a.wav"), Options(resample=True), shortest=400)
    found = audio.read_resampled(item.recording)
    expected = sum(np.sin(2 * np.pi * f * to) for f in kept)
    assert abs(item.num_samples - 32_000) <= 1
    assert len(found) == pytest.approx(32_000, abs=1)
    middle = slice(1000, 31_000)
    gain = float(found[middle] @ expected[middle] / (expected[middle] @ expected[middle]))
    assert np.abs(found[middle] / gain - expected[middle]).max() < 1e-3


def test_bad_recordings(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "audio"
    for i in range(6):
        noise(folder / f"{i}.{'flac' if i == 2 else 'wav'}", 8000 + i, seed=i)
    (folder / "2.flac").write_bytes((folder / "2.flac").read_bytes()[:5000])
    (folder / "4.wav").write_bytes(b"")
    for batch in (0, 10):
        out = tmp_path / f"{batch}"
        options = Options(on_error="skip", batch_seconds=batch, progress=False)
        with pytest.raises(InputError, match=r"(2\.flac|4\.wav)"):
            extract_features(folder, out, model=checkpoint, layer=LAYER, options=QUIET)
        skipped = extract_features(folder, out, model=checkpoint, layer=LAYER, options=options)
        assert set(skipped) == {"2", "4"}
        assert {p.name for p in out.glob("*.npy")} == {f"{i}.npy" for i in (0, 1, 3, 5)}
        assert set(json.loads((out / "extract.json").read_text())["skipped"]) == {"2", "4"}
        table = tmp_path / f"{batch}.jsonl"
        assert set(extract_units(folder, table, model=checkpoint, layer=LAYER, options=options)) == {"2", "4"}
        assert list(rows(table)) == ["0", "1", "3", "5"]
        noise(folder / "4.wav")  # repaired: the same command encodes only this file
        assert set(extract_units(folder, table, model=checkpoint, layer=LAYER, options=options)) == {"2"}
        assert list(rows(table)) == ["0", "1", "3", "4", "5"]
        (folder / "4.wav").write_bytes(b"")


def test_recordings_that_differ_from_the_manifest(checkpoint: Path, tmp_path: Path) -> None:
    file = noise(tmp_path / "audio" / "a.wav")
    write_manifest(tmp_path / "audio", tmp_path / "m.csv")
    file.write_bytes(file.read_bytes()[:9000])
    with pytest.raises(InputError, match=r"a\.wav: 4478 samples, the manifest says 8000"):
        extract_units(tmp_path / "m.csv", tmp_path / "u.jsonl", model=checkpoint, layer=LAYER, options=QUIET)


def test_lengths_of_older_manifests_are_rounded(model: DinoSR, checkpoint: Path, tmp_path: Path) -> None:
    """spidr 0.1.2 wrote them with a sample too many or too few."""
    file = noise(tmp_path / "a.flac", 8000)
    expected = model.units(read(file).unsqueeze(0), layer=LAYER)[0][0].tolist()
    for given in (7999, 8001):
        (tmp_path / "m.csv").write_text(f"fileid,path,num_samples\na,{file},{given}\n")
        extract_units(tmp_path / "m.csv", tmp_path / f"{given}.jsonl", model=checkpoint, layer=LAYER, options=QUIET)
        assert units(tmp_path / f"{given}.jsonl") == {"a": expected}
    for given in (7998, 8002):
        (tmp_path / "m.csv").write_text(f"fileid,path,num_samples\na,{file},{given}\n")
        with pytest.raises(InputError, match=rf"a\.flac: 8000 samples, the manifest says {given}"):
            extract_units(tmp_path / "m.csv", tmp_path / "u.jsonl", model=checkpoint, layer=LAYER, options=QUIET)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_file_names_that_are_not_utf8(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "audio" / os.fsdecode(b"caf\xe9.wav")
    noise(tmp_path / "a.wav", 16_000).rename(tmp_path / "b.wav")
    file.parent.mkdir()
    (tmp_path / "b.wav").rename(file)
    common: Any = {"model": checkpoint, "layer": LAYER, "options": QUIET}
    extract_features(file.parent, tmp_path / "f", **common)
    extract_features(file.parent, tmp_path / "f", **common)
    assert (tmp_path / "f" / f"{file.stem}.npy").exists()
    extract_units(file.parent, tmp_path / "u.jsonl", **common)
    extract_units(file.parent, tmp_path / "u.jsonl", **common)
    assert set(units(tmp_path / "u.jsonl")) == {file.stem}
    fit_kmeans(file.parent, tmp_path / "k.npz", units=2, **common)
    monkeypatch.setattr(session.Session, "run", lambda *_: pytest.fail("encoded"))
    arguments = ["units", str(file.parent), str(tmp_path / "u.parquet"), "--model", str(checkpoint), "--layer", "3"]
    assert main(arguments) == 2
    assert r"audio/caf\udce9.wav': the name is not UTF-8, which Parquet cannot hold." in capsys.readouterr().err

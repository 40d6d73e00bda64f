"""A corpus into features and units: the same for every recording whatever happens around it, and never half."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import soundfile
import torch

import spidr
from small_models import tiny_model
from spidr.config import DEFAULT_CONV_LAYER_CONFIG, DinoSRConfig, SpidRConfig
from spidr.data.write_manifest import write_manifest, write_manifest_fairseq, write_manifest_tar
from spidr.extract import Options, encoder, extract_features, extract_units, features, fit_kmeans, kmeans, sources
from spidr.extract import units as units_module
from spidr.extract.__main__ import main
from spidr.models import DinoSR, num_frames
from spidr.tools.errors import InputError
from spidr.tools.lock import Process

PROMPTS = Path(__file__).parents[1] / "examples" / "quickstart" / "audio"
LAYER = 3
SHAPES = [(16, kernel, stride) for _, kernel, stride in DEFAULT_CONV_LAYER_CONFIG]
QUIET = Options(progress=False)


def has_ffmpeg() -> bool:
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def save(model: DinoSR, folder: Path) -> Path:
    """A checkpoint and the configuration beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict()}, folder / "model.pt")
    document = {"model_type": type(model).__name__.lower(), "model": asdict(model.cfg)}
    (folder / "config.json").write_text(json.dumps(document))
    return folder / "model.pt"


def small(model_type: str = "spidr", seed: int = 0) -> DinoSR:
    """A tiny model with 50 frames a second."""
    return tiny_model(model_type, seed, extractor_conv_layer_config=SHAPES).eval()


def nearly_tied(model_type: str) -> DinoSR:
    """A model in whose heads every codeword has a double that differs by rounding only: batching decides which wins."""
    model = small(model_type)
    for head in model.heads:
        weight, bias = head[0].weight.data, head[0].bias.data
        weight[1::2] = weight[::2] * (1 + 1e-6 * torch.rand_like(weight[::2]))
        bias[1::2] = bias[::2]
    return model


@pytest.fixture(scope="module")
def model() -> DinoSR:
    return small()


@pytest.fixture(scope="module")
def checkpoint(model: DinoSR, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("model"))


def read(path: Path) -> torch.Tensor:
    return torch.from_numpy(soundfile.read(path, dtype="float32")[0])


def noise(path: Path, samples: int = 8000, rate: int = 16_000, seed: int = 0, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = 0.1 * np.random.default_rng((seed, samples)).standard_normal((samples, channels))
    soundfile.write(path, values, rate)
    return path


def rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["fileid"]: row for row in map(json.loads, path.read_text().splitlines())}


def units(path: Path) -> dict[str, list[int]]:
    return {name: row["units"] for name, row in rows(path).items()}


# ---------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("model_type", ["spidr", "dinosr"])
def test_units_are_those_of_each_recording_alone(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nearly_tied(model_type)
    files = sorted(PROMPTS.iterdir())[:: 3 if model_type == "spidr" else 8]
    expected = {file.stem: model.units(read(file).unsqueeze(0), layer=LAYER)[0][0].tolist() for file in files}
    found = {}
    for name, batch, threads, order in (
        ("alone", 0, 1, 0),
        ("threads", 0, 3, 1),
        ("batch", 20, 1, 2),
        ("large", 90, 2, 3),
    ):
        random.Random(order).shuffle(files)
        options = Options(batch_seconds=batch, threads=threads, progress=False)
        extract_units(files, tmp_path / f"{name}.jsonl", model=model, layer=LAYER, options=options)
        found[name] = units(tmp_path / f"{name}.jsonl")
    assert [name for name in found if found[name] != expected] == []
    # Without the second look at what is nearly tied, some would not be.
    monkeypatch.setattr(encoder, "NEAR", 0.0)
    options = Options(batch_seconds=90, progress=False)
    extract_units(files, tmp_path / "once.jsonl", model=model, layer=LAYER, options=options)
    assert units(tmp_path / "once.jsonl") != expected


def test_features_are_those_of_each_recording_alone(model: DinoSR, tmp_path: Path) -> None:
    files = sorted(PROMPTS.iterdir())[::6]
    for batch, threads in ((0, 1), (0, 3), (60, 1)):
        options = Options(batch_seconds=batch, threads=threads, progress=False)
        extract_features(files, tmp_path / f"{batch}-{threads}", model=model, layer=LAYER, options=options)
    differences = []
    for file in files:
        expected = model.encode(read(file).unsqueeze(0), layer=LAYER)[0][0].numpy()
        alone, threads, batched = (np.load(tmp_path / name / f"{file.stem}.npy") for name in ("0-1", "0-3", "60-1"))
        assert alone.dtype == np.float32
        np.testing.assert_array_equal(alone, expected)
        np.testing.assert_array_equal(threads, expected)
        differences.append(np.abs(batched - expected).max())
    assert 0 < max(differences) < 1e-5


def test_standardisation_does_not_depend_on_padding(model: DinoSR) -> None:
    waveform = 0.01 * torch.randn(30_011) + 0.3
    alone, _ = model._utterances(waveform.unsqueeze(0), None, normalize=True)
    padded = torch.stack([torch.nn.functional.pad(waveform, (0, 5000)), torch.randn(35_011)])
    batched, _ = model._utterances(padded, [30_011, 35_011], normalize=True)
    assert torch.equal(batched[0, :30_011], alone[0])


def test_long_recordings_in_windows(model: DinoSR, tmp_path: Path) -> None:
    file = noise(tmp_path / "long.wav", 160_000)
    options = Options(window=2.0, context=0.5, batch_seconds=60, progress=False)
    extract_features([file, noise(tmp_path / "b.wav")], tmp_path / "out", model=model, layer=LAYER, options=options)
    expected, _ = model.encode(read(file).unsqueeze(0), layer=LAYER, window=2.0, context=0.5)
    found = np.load(tmp_path / "out" / "long.npy")
    np.testing.assert_array_equal(found, expected[0].numpy())
    whole, _ = model.encode(read(file).unsqueeze(0), layer=LAYER)
    assert not np.allclose(found, whole[0].numpy(), atol=1e-4)


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_recordings_of_unknown_length_go_alone(
    seconds: float | None, model: DinoSR, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest that says 0, where it is not checked: in windows all the same, and k-means draws no more frames."""
    files = [noise(tmp_path / f"{i}.wav", samples, seed=i) for i, samples in enumerate((160_000, 96_000, 8000))]
    lines = [f"{file.stem},{file},{0 if i < 2 else 8000}" for i, file in enumerate(files)]
    (tmp_path / "m.csv").write_text("\n".join(["fileid,path,num_samples", *lines]))
    options = Options(window=2.0, context=0.5, batch_seconds=seconds, resample=True, progress=False)
    together = []
    original = encoder.Encoder.features

    def features(self: encoder.Encoder, waveforms: list[torch.Tensor]) -> list[torch.Tensor]:
        together.append(len(waveforms))
        return original(self, waveforms)

    monkeypatch.setattr(encoder.Encoder, "features", features)
    extract_features(tmp_path / "m.csv", tmp_path / "f", model=checkpoint, layer=LAYER, options=options)
    assert together == [1, 1, 1]
    for file in files:
        expected, _ = model.encode(read(file).unsqueeze(0), layer=LAYER, window=2.0, context=0.5)
        np.testing.assert_array_equal(np.load(tmp_path / "f" / f"{file.stem}.npy"), expected[0].numpy())
    out = tmp_path / "k.npz"
    fit_kmeans(tmp_path / "m.csv", out, model=checkpoint, layer=2, units=4, max_frames=50, options=options)
    with np.load(out) as archive:
        assert json.loads(str(archive["made"]))["frames"] == 50


def test_bfloat16(model: DinoSR, tmp_path: Path) -> None:
    file = noise(tmp_path / "a.wav", 32_000)
    for dtype in ("float32", "bfloat16"):
        options = Options(dtype=dtype, progress=False)  # type: ignore[arg-type]
        extract_features(file, tmp_path / dtype, model=model, layer=LAYER, options=options)
    exact, rounded = (np.load(tmp_path / dtype / "a.npy") for dtype in ("float32", "bfloat16"))
    assert rounded.dtype == np.float32
    assert 0 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()


def test_number_of_frames(tmp_path: Path) -> None:
    assert [num_frames(n) for n in (0, 399, 400, 719, 720, 16_000)] == [0, 0, 1, 1, 2, 49]


# ---------------------------------------------------------------------------------------------------- inputs


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
            items = sources.find_items(paths, tree=tree, resample=False, skip=False)
            files = {file for path in paths for file in ([path] if path.is_file() else path.rglob("*.*"))}
            assert {item.recording.path for item in items} == {str(file) for file in files}
            assert len({item.name for item in items}) == len(items)
            assert not any(Path(item.name).is_absolute() or ".." in item.name.split("/") for item in items)
    out = tmp_path / "out"
    extract_features([tmp_path / "x", tmp_path / "y"], out, model=checkpoint, layer=LAYER, options=QUIET)
    assert len(list(out.rglob("*.npy"))) == 5


@pytest.mark.parametrize(
    ("rate", "channels", "message"), [(44_100, 1, "the sample rate is 44100 Hz"), (16_000, 2, "2 channels")]
)
def test_other_formats_are_refused_with_the_remedy(
    rate: int, channels: int, message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = noise(tmp_path / "a.wav", 8000, rate, channels=channels)
    assert main(["units", str(file), str(tmp_path / "u.jsonl"), "--model", str(checkpoint), "--layer", "3"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "--resample does it on the way" in error
    assert str(file) in error


@pytest.mark.skipif(not has_ffmpeg(), reason="FFmpeg is not installed")
@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_resampling_keeps_what_can_be_kept(rate: int, tmp_path: Path) -> None:
    at, to = np.arange(2 * rate) / rate, np.arange(32_000) / 16_000
    kept = (300, 1000, 3000) if rate == 8000 else (300, 1000, 6000)
    lost = 0.2 * np.sin(2 * np.pi * 10_000 * at) if rate > 20_000 else 0.0  # would come back as 6000 Hz
    sound = lost + sum(0.1 * np.sin(2 * np.pi * f * at) for f in kept)
    soundfile.write(tmp_path / "a.wav", np.stack([sound, sound], 1), rate, subtype="FLOAT")
    (item,) = sources.find_items([tmp_path / "a.wav"], tree=True, resample=True, skip=False)
    found = sources.read_item(item, resample=True)
    expected = sum(np.sin(2 * np.pi * f * to) for f in kept)
    assert abs(item.num_samples - 32_000) <= 1
    assert len(found) == pytest.approx(32_000, abs=1)
    middle = slice(1000, 31_000)
    gain = float(found[middle] @ expected[middle] / (expected[middle] @ expected[middle]))
    assert np.abs(found[middle] / gain - expected[middle]).max() < 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "OUT.jsonl"], "nowhere: does not exist; expected a manifest, a folder or an audio file"),
        (["DIR", "OUT.txt"], "must end in .jsonl or .parquet"),
        (["DIR", "OUT.jsonl", "--layer", "1"], "layer 1 has no codebook; layers 2 to 4 have a codebook"),
        (["DIR", "OUT.jsonl", "--layer", "5"], "layer 5 does not exist; layers 2 to 4 have a codebook"),
        (["DIR", "OUT.jsonl", "--model", "wav2vec"], "wav2vec: neither a file nor a published model (spidr_base, "),
        (["DIR", "OUT.jsonl", "--window", "0"], "window: found 0.0, expected seconds, more than 0"),
        (["DIR", "OUT.jsonl", "--window", "-1"], "window: found -1.0, expected seconds, more than 0"),
        (["DIR", "OUT.jsonl", "--window", "inf"], "window: found inf, expected seconds, more than 0"),
        (["DIR", "OUT.jsonl", "--window", "nan"], "window: found nan, expected seconds, more than 0"),
        (["DIR/a.wav", "OUT.jsonl", "--window", "0.001"], "window = 0.001 s is shorter than a frame of 0.02 s"),
        (["DIR", "OUT.jsonl", "--window", "1", "--context", "inf"], "context: found inf, expected seconds, 0 or more"),
        (["DIR", "OUT.jsonl", "--window", "1", "--context", "nan"], "context: found nan, expected seconds, 0 or more"),
        (["DIR", "OUT.jsonl", "--window", "1", "--context", "-2"], "context: found -2.0, expected seconds, 0 or more"),
        (["DIR", "OUT.jsonl", "--batch-seconds", "nan"], "batch_seconds: found nan, expected seconds, 0 or more"),
        (["DIR", "OUT.jsonl", "--threads", "0"], "threads: found 0, expected 1 to 1,000"),
        (["DIR", "OUT.jsonl", "--threads", "1001"], "threads: found 1001, expected 1 to 1,000"),
        (["DIR", "OUT.jsonl", "--threads", "9" * 30], f"threads: found {'9' * 30}, expected 1 to 1,000"),
        (
            ["DIR", "OUT.jsonl", "--window", "1e7"],
            "window: found 10000000.0, expected seconds, more than 0, at most 1,000,0",
        ),
        (["DIR", "OUT.jsonl", "--batch-seconds", "1e9"], "expected seconds, 0 or more, at most 1,000,000"),
        (["DIR", "OUT.jsonl", "--context", "1"], "there is no window"),
        (["DIR", "OUT.jsonl", "--kmeans", "none.npz"], "none.npz: does not exist; write it with"),
        (["EMPTY", "OUT.jsonl"], "no file's name ends like that of a recording"),
        (["archive.tar", "OUT.jsonl"], "write the manifest of an archive first"),
        (["DIR/short.wav", "OUT.jsonl"], "short.wav: 9 samples are too short"),
    ],
)
def test_wrong_input(
    arguments: list[str],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    noise(tmp_path / "DIR" / "a.wav")
    noise(tmp_path / "DIR" / "short.wav", 9)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "archive.tar").touch()
    defaults = ["--model", str(checkpoint)] if "--model" not in arguments else []
    defaults += ["--layer", "3"] if "--layer" not in arguments else []
    assert main(["units", *arguments, *defaults, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "OUT.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("device", "gpu", "auto, cuda, mps or cpu"),
        ("dtype", "float16", "float32, bfloat16 or auto"),
        ("on_error", "ignore", "raise or skip"),
        ("file_format", "numpy", "npy or pt"),
        ("output_dtype", "bfloat16", "float32 or float16"),
    ],
)
def test_wrong_choices_from_python(name: str, value: str, accepted: str, tmp_path: Path) -> None:
    choice: Any = {name: value}
    call: Any = functools.partial(extract_features, noise(tmp_path / "a.wav"), tmp_path / "f")
    with pytest.raises(InputError, match=f"^{name}: found '{value}', expected {accepted}$"):
        (call if name in ("file_format", "output_dtype") else Options)(**choice)


@pytest.mark.parametrize("command", ["units", "features", "kmeans"])
@pytest.mark.parametrize(
    ("model", "advice"),
    [
        ("spidr_bsae", "; did you mean spidr_base?"),
        ("dinosr_base", "; did you mean dinosr_base_original?"),
        ("audio", " (spidr_base, dinosr_base_reproduced, dinosr_base_original)"),  # a folder
    ],
)
def test_a_mistyped_model_is_reported_before_the_sources_are_read(
    command: str,
    model: str,
    advice: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "a.wav").write_bytes(b"would be refused")
    output = {"units": "u.jsonl", "features": "f", "kmeans": "k.npz"}[command]
    assert main([command, "audio", output, "--model", model]) == 2
    assert capsys.readouterr().err == f"error: {model}: neither a file nor a published model{advice}\n"


def test_the_default_layer_of_a_small_model(checkpoint: Path, tmp_path: Path) -> None:
    file = noise(tmp_path / "a.wav")
    for extract, output, last in (
        (extract_units, "u.jsonl", "2 to 4 have a codebook"),
        (extract_features, "f", "1 to 4 exist"),
    ):
        with pytest.raises(InputError, match=f"^layer 6, the default, does not exist; layers {last}$"):
            extract(file, tmp_path / output, model=checkpoint, options=QUIET)


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
        noise(folder / "4.wav")  # mended: the same command encodes it, and only it
        assert set(extract_units(folder, table, model=checkpoint, layer=LAYER, options=options)) == {"2"}
        assert list(rows(table)) == ["0", "1", "3", "4", "5"]
        (folder / "4.wav").write_bytes(b"")


def test_recordings_that_are_not_as_the_manifest_says(checkpoint: Path, tmp_path: Path) -> None:
    file = noise(tmp_path / "audio" / "a.wav")
    write_manifest(tmp_path / "audio", tmp_path / "m.csv")
    file.write_bytes(file.read_bytes()[:9000])
    with pytest.raises(InputError, match=r"a\.wav: 4478 samples, the manifest says 8000"):
        extract_units(tmp_path / "m.csv", tmp_path / "u.jsonl", model=checkpoint, layer=LAYER, options=QUIET)


def test_lengths_of_older_manifests_are_rounded(model: DinoSR, checkpoint: Path, tmp_path: Path) -> None:
    """spidr 0.1.2 wrote them so: a sample too many or too few."""
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


def test_as_many_threads_as_are_accepted(checkpoint: Path, tmp_path: Path) -> None:
    files = [noise(tmp_path / f"{i}.wav", 4000) for i in range(20)]
    options = Options(threads=1000, progress=False)
    extract_units(files, tmp_path / "u.jsonl", model=checkpoint, layer=LAYER, options=options)
    assert len(rows(tmp_path / "u.jsonl")) == 20


# ---------------------------------------------------------------------------------------------------- outputs


def test_features_in_files(model: DinoSR, checkpoint: Path, tmp_path: Path) -> None:
    noise(tmp_path / "audio" / "a.wav")
    exact = model.encode(read(tmp_path / "audio" / "a.wav").unsqueeze(0), layer=LAYER)[0][0]
    for file_format, stored in (("npy", "float32"), ("npy", "float16"), ("pt", "float32"), ("pt", "float16")):
        out = tmp_path / file_format / stored
        arguments = [
            "features",
            str(tmp_path / "audio"),
            str(out),
            "--model",
            str(checkpoint),
            "--layer",
            "3",
            "--quiet",
        ]
        assert main([*arguments, "--format", file_format, "--store", stored]) == 0
        file = out / f"a.{file_format}"
        found = torch.load(file) if file_format == "pt" else torch.from_numpy(np.load(file))
        assert torch.equal(found, exact.to(getattr(torch, stored)))
        record = json.loads((out / "extract.json").read_text())
        assert record["model"] == str(checkpoint)
        assert (record["layer"], record["spidr"], record["stored"]) == (LAYER, spidr.__version__, stored)


@pytest.mark.parametrize(
    ("samples", "expected"), [(288_000, r"0\.60/0\.60 min of audio"), (28_800_000, r"1\.00/1\.00 h of audio")]
)
def test_progress_in_minutes_or_hours_of_audio(
    samples: int, expected: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["fileid,path,num_samples"]
    for name in ("a", "b"):
        file = noise(tmp_path / f"{name}.wav", min(samples, 288_000))  # the long ones are not as long: skipped
        lines.append(f"{name},{file},{samples}")
    (tmp_path / "m.csv").write_text("\n".join(lines))
    arguments = ["features", str(tmp_path / "m.csv"), str(tmp_path / "f"), "--model", str(checkpoint), "--layer", "3"]
    assert main([*arguments, "--on-error", "skip"]) == 0
    shown = capsys.readouterr().err.replace("\r", "\n").split("\n")
    bar = [line for line in shown if line.startswith("Features: ")]
    assert bar[0].startswith("Features:   0%|")
    assert re.fullmatch(rf"Features: 100%\|.*\| {expected}, 00:\d\d passed, 00:00 left *", bar[-1])
    if samples == 288_000:
        assert main(arguments) == 0
        assert capsys.readouterr().err == ""  # nothing was left to do


def test_units_in_tables(model: DinoSR, checkpoint: Path, tmp_path: Path) -> None:
    files = sorted(PROMPTS.iterdir())[:5]
    expected = {file.stem: model.units(read(file).unsqueeze(0), layer=LAYER)[0][0].tolist() for file in files}
    for suffix in ("jsonl", "parquet"):
        plain, merged = tmp_path / f"plain.{suffix}", tmp_path / f"merged.{suffix}"
        common = [*map(str, files), "--model", str(checkpoint), "--layer", "3", "--quiet"]
        assert main(["units", *common[:5], str(plain), *common[5:]]) == 0
        assert main(["units", *common[:5], str(merged), *common[5:], "--dedup"]) == 0
        table, runs = (pl.read_ndjson(p) if suffix == "jsonl" else pl.read_parquet(p) for p in (plain, merged))
        assert table.columns == ["fileid", "units"]
        assert dict(table.iter_rows()) == expected
        assert runs.columns == ["fileid", "units", "durations"]
        for name, found, durations in runs.iter_rows():
            assert found == [unit for unit, _ in groupby(found)]
            assert np.repeat(found, durations).tolist() == expected[name]
        record = json.loads(plain.with_name(f"{plain.name}.json").read_text())
        assert (record["layer"], record["spidr"]) == (LAYER, spidr.__version__)
        if suffix == "parquet":
            assert json.loads(pl.read_parquet_metadata(plain)["spidr"]) == record
        plain.with_name(f"{plain.name}.json").unlink()
        with pytest.raises(InputError, match=r"no plain\.(jsonl|parquet)\.json says how it was made"):
            extract_units(files, plain, model=checkpoint, layer=LAYER, options=QUIET)


def test_other_settings_into_the_same_output(checkpoint: Path, tmp_path: Path) -> None:
    noise(tmp_path / "audio" / "a.wav")
    table, folder, source = tmp_path / "u.jsonl", tmp_path / "f", tmp_path / "audio"
    extract_units(source, table, model=checkpoint, layer=3, options=QUIET)
    before = table.read_bytes()
    other = save(small(seed=1), tmp_path / "other")
    for changes in ({"layer": 4}, {"dedup": True}, {"model": other}, {"options": Options(dtype="bfloat16")}):
        settings: Any = {"model": checkpoint, "layer": 3, "options": QUIET} | changes
        with pytest.raises(InputError, match=r"u\.jsonl\.json: .* made with (layer|dedup|model|dtype) = "):
            extract_units(source, table, **settings)
    assert table.read_bytes() == before
    extract_features(source, folder, model=checkpoint, layer=3, options=QUIET)
    with pytest.raises(InputError, match='made with stored = "float32", now it is "float16"'):
        extract_features(source, folder, model=checkpoint, layer=3, output_dtype="float16", options=QUIET)
    with pytest.raises(InputError, match="is not empty"):
        extract_features(source, tmp_path / "audio", model=checkpoint, layer=3, options=QUIET)


def test_another_recording_of_the_same_name(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (noise(tmp_path / corpus / "s/u.wav", seed=i) for i, corpus in enumerate(("1", "2")))
    noise(tmp_path / "3" / "s/v.wav", seed=3)
    cases: list[tuple[Any, str, str]] = [
        (extract_features, "f", "f/recordings.json"),
        (extract_units, "u.jsonl", "u.jsonl.recordings.json"),
        (extract_units, "u.parquet", "u.parquet.recordings.json"),
    ]
    for extract, output, said in cases:
        common: Any = {"model": checkpoint, "layer": LAYER, "options": QUIET}
        extract("1", output, **common)
        extract("3", output, **common)
        with pytest.raises(InputError, match="Choose another output; if the recordings have only been moved, remove"):
            extract("2", output, **common)  # what came between is no matter
        extract("1", output, **common)
        files = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
        with pytest.raises(InputError, match=rf"^{said}: the output of (s/)?u there is that of {first}, .* {second}\."):
            extract("2", output, **common)
        extract(tmp_path / "1", tmp_path / output, **common)  # the same recording
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == files
        Path(said).write_text("[]")
        with pytest.raises(InputError, match=rf"{said}: says of which recordings .* but cannot be read"):
            extract("1", output, **common)
        Path(said).unlink()  # of an earlier version
        extract("1", output, **common)
        assert list(json.loads(Path(said).read_text()).values()) == [str(first)]


def test_a_name_of_which_nothing_is_done(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1/u.wav").write_bytes(b"no recording")
    noise(tmp_path / "2/u.wav")
    options = Options(on_error="skip", progress=False)
    cases: list[tuple[Any, str]] = [(extract_features, "f"), (extract_units, "u.jsonl")]
    for extract, output in cases:
        common: Any = {"model": checkpoint, "layer": LAYER, "options": options}
        assert set(extract(tmp_path / "1", tmp_path / output, **common)) == {"u"}
        assert extract(tmp_path / "2", tmp_path / output, **common) == {}


def test_a_corpus_that_grows(model: DinoSR, checkpoint: Path, tmp_path: Path) -> None:
    corpus, common = tmp_path / "corpus", {"model": checkpoint, "layer": LAYER, "options": QUIET}

    def unit(name: str) -> list[int]:
        return model.units(read(corpus / name).unsqueeze(0), layer=LAYER)[0][0].tolist()

    noise(corpus / "a" / "u.wav", seed=1)
    noise(corpus / "a" / "v.wav", seed=2)
    for name in ("u.jsonl", "u.parquet"):
        out, found = (
            tmp_path / name,
            units if name == "u.jsonl" else lambda path: dict(pl.read_parquet(path).iter_rows()),
        )
        extract_units(corpus, out, **common)  # type: ignore[arg-type]
        noise(corpus / "b" / "w.wav", seed=3)
        extract_units(corpus / "b", out, **common)  # type: ignore[arg-type]
        assert list(found(out).items()) == [("u", unit("a/u.wav")), ("v", unit("a/v.wav")), ("w", unit("b/w.wav"))]
        extract_units(corpus / "a", out, **common)  # type: ignore[arg-type]
        assert list(found(out)) == ["w", "u", "v"]
        noise(corpus / "u.wav", seed=4)  # now the names of the others are longer, and `u` is another
        with pytest.raises(InputError, match=r"the output of u there is that of .*/a/u\.wav, now .*/corpus/u\.wav"):
            extract_units(corpus, out, **common)  # type: ignore[arg-type]
        (corpus / "u.wav").rename(corpus / "b" / "u.wav")
        extract_units(corpus, out, **common)  # type: ignore[arg-type]
        assert found(out) == {name: unit(f"{name}.wav") for name in ("a/u", "a/v", "b/u", "b/w")}
        shutil.rmtree(corpus / "b")


@pytest.mark.parametrize("flat", [False, True])
def test_a_name_that_is_too_long_for_a_file(flat: bool, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(f"fileid,path,num_samples\n{'x' * 300},{noise(tmp_path / 'a.wav')},8000\n")
    noise(tmp_path / "b.wav")
    common: Any = {"model": checkpoint, "layer": LAYER, "flat": flat, "options": QUIET}
    if not flat:  # named by its path
        assert extract_features(tmp_path / "m.csv", tmp_path / "f", **common) == {}
        return
    with pytest.raises(InputError, match=r"xxx\.npy: cannot be written \(File name too long\)"):
        extract_features(tmp_path / "m.csv", tmp_path / "f", **common)


def test_damaged_parquet(checkpoint: Path, tmp_path: Path) -> None:
    file, out = noise(tmp_path / "a.wav"), tmp_path / "u [1].parquet"
    extract_units(file, out, model=checkpoint, layer=LAYER, options=QUIET)
    extract_units(file, out, model=checkpoint, layer=LAYER, options=QUIET)
    whole = out.read_bytes()
    for damaged in (b"", whole[:100], whole[:50] + bytes(100) + whole[150:], bytes(len(whole))):
        out.write_bytes(damaged)
        with pytest.raises(InputError, match=r"u \[1\]\.parquet: cannot be read \(.*\)\. Remove it\.$"):
            extract_units(file, out, model=checkpoint, layer=LAYER, options=QUIET)
    out.unlink()
    extract_units(file, out, model=checkpoint, layer=LAYER, options=QUIET)
    assert pl.read_parquet(out.open("rb"))["fileid"].to_list() == ["a"]


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
    monkeypatch.setattr(encoder.Encoder, "run", lambda *_: pytest.fail("encoded"))
    arguments = ["units", str(file.parent), str(tmp_path / "u.parquet"), "--model", str(checkpoint), "--layer", "3"]
    assert main(arguments) == 2
    assert r"audio/caf\udce9.wav': the name is not UTF-8, which Parquet cannot hold." in capsys.readouterr().err


def test_a_full_disk(checkpoint: Path, tmp_path: Path) -> None:
    """Limits to the size of files stand for it."""
    for i in range(20):
        noise(tmp_path / "audio" / f"{i}.wav", 16_000, seed=i)
    script = (
        "import resource, sys; from spidr.extract.__main__ import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY)); code = main(); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, [resource.RLIM_INFINITY] * 2); sys.exit(code)"
    )
    options = ["--model", checkpoint, "--layer", LAYER, "--threads", 1]
    arguments = command("units", tmp_path / "audio", tmp_path / "u.jsonl", *options)[3:]
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    pattern = r"error: .*u\.jsonl\.unfinished/\d+-0\.jsonl: cannot be written \(File too large\)\. .*: make room, .*\n"
    assert re.fullmatch(pattern, result.stderr)
    assert main(arguments) == 0
    assert len(rows(tmp_path / "u.jsonl")) == 20


@pytest.mark.parametrize("kind", ["features", "units"])
def test_no_thread_outlives_an_error(
    kind: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [noise(tmp_path / f"{i}.wav", seed=i) for i in range(30)]
    before = set(threading.enumerate())

    def fail(*_: object, **__: object) -> Any:
        raise InputError("no room")

    monkeypatch.setattr(features, "atomic_write", fail)
    monkeypatch.setattr(units_module, "_line", fail)
    extract: Any = extract_features if kind == "features" else extract_units
    options = Options(threads=2, progress=False)
    with pytest.raises(InputError, match="no room") as error:
        extract(files, tmp_path / "out.jsonl", model=checkpoint, layer=LAYER, options=options)
    assert set(threading.enumerate()) <= before
    del error  # holds what was running


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_num_heads": 2},
        {"encoder_layer_norm_first": True},
        {"extractor_conv_layer_config": [(16, kernel, stride + 1) for _, kernel, stride in SHAPES]},
        {"encoder_dropout": 0.5, "encoder_attention_dropout": 0.5, "ema_timescale": 7, "codebook_decay": 0.5},
    ],
)
def test_equal_weights_in_another_model(changes: dict[str, Any], tmp_path: Path) -> None:
    """Other heads and strides give other features, settings of training do not."""
    common: dict[str, Any] = {"extractor_conv_layer_config": SHAPES, "encoder_num_heads": 4}
    model, other = (tiny_model("spidr", 0, **common | changed).eval() for changed in ({}, changes))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    file = noise(tmp_path / "a.wav")
    extract_features(file, tmp_path / "f", model=model, layer=LAYER, options=QUIET)
    (tmp_path / "f" / "a.npy").unlink()
    if "encoder_dropout" in changes:
        extract_features(file, tmp_path / "f", model=other, layer=LAYER, options=QUIET)
    else:
        with pytest.raises(InputError, match="made with weights = "):
            extract_features(file, tmp_path / "f", model=other, layer=LAYER, options=QUIET)


def test_every_setting_of_a_model_is_of_its_features_or_of_training() -> None:
    training = {
        "encoder_projection_dropout",
        "encoder_attention_dropout",
        "encoder_ff_interm_dropout",
        "encoder_dropout",
        "encoder_layer_drop",
        "codebook_decay",
        "codebook_init",
        "codebook_revive_after",
        "freeze_step",
    }
    names = {field.name for config in (DinoSRConfig, SpidRConfig) for field in fields(config)}
    assert {name for name in names - training if not name.startswith("ema_")} == set(encoder.SHAPING)


# ---------------------------------------------------------------------------------------------------- interruptions


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "spidr.extract", *map(str, arguments), "--quiet"]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every third prompt."""
    folder = tmp_path_factory.mktemp("prompts")
    for file in sorted(PROMPTS.iterdir())[::3]:
        (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features and units of all of them, in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    extract_units(prompts, folder / "u.jsonl", model=checkpoint, layer=LAYER, options=QUIET)
    extract_features(prompts, folder / "f", model=checkpoint, layer=LAYER, options=QUIET)
    return folder


@pytest.mark.parametrize("kind", ["units", "features"])
def test_killed_and_started_again(
    kind: str, checkpoint: Path, prompts: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / ("u.jsonl" if kind == "units" else "f")

    def done() -> set[str]:
        if kind == "features":
            return {p.stem for p in out.glob("[!.]*.npy")}
        parts = (tmp_path / "u.jsonl.unfinished").glob("*.jsonl")
        return {
            json.loads(line)["fileid"]
            for p in parts
            for line in p.read_bytes().splitlines(keepends=True)
            if line[-1] == 10
        }

    options = ["--model", checkpoint, "--layer", LAYER, "--threads", 1]
    with subprocess.Popen(command(kind, prompts, out, *options), stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: len(done()) >= 5, process)
        process.send_signal(signal.SIGKILL)
    before = done()
    assert 5 <= len(before) < 72
    assert not (tmp_path / "u.jsonl").exists()
    if kind == "units":  # as if it had been killed while it wrote
        (part,) = (tmp_path / "u.jsonl.unfinished").glob("*.jsonl")
        with part.open("ab") as file:
            file.write(b'{"fileid": "half", "units": [1, 2')
    else:
        (out / f".spidr-{Process.current().machine}-{process.pid}-1-0.tmp").write_bytes(b"half")
    read_again = []
    monkeypatch.setattr(
        encoder, "read_item", lambda item, **kw: (read_again.append(item.name), sources.read_item(item, **kw))[1]
    )
    again: Any = extract_units if kind == "units" else extract_features
    again(prompts, out, model=checkpoint, layer=LAYER, options=QUIET)
    assert not before & set(read_again)
    assert len(before) + len(read_again) == 72
    if kind == "units":
        assert out.read_bytes() == (undisturbed / "u.jsonl").read_bytes()
        assert {p.name for p in tmp_path.iterdir()} == {"u.jsonl", "u.jsonl.json", "u.jsonl.recordings.json"}
    else:
        assert {p.name for p in out.iterdir()} == {p.name for p in (undisturbed / "f").iterdir()}
        assert all(p.read_bytes() == (undisturbed / "f" / p.name).read_bytes() for p in out.iterdir())
    read_again.clear()
    again(prompts, out, model=checkpoint, layer=LAYER, options=QUIET)
    assert read_again == []


@pytest.mark.parametrize(
    ("kind", "said"), [("features", "goes on where it stopped"), ("units", "goes on"), ("kmeans", "begins again")]
)
def test_what_an_interruption_says(
    kind: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    name = {"features": "extract_features", "units": "extract_units", "kmeans": "fit_kmeans"}[kind]
    monkeypatch.setattr(f"spidr.extract.{name}", interrupt)
    assert main([kind, str(tmp_path), str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.startswith(f"interrupted; the same command {said}")


def test_processes_share_the_work(checkpoint: Path, prompts: Path, undisturbed: Path, tmp_path: Path) -> None:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "spidr.extract",
    ]
    options = ["--model", checkpoint, "--layer", LAYER, "--batch-seconds", 20]
    arguments = command("units", prompts, tmp_path / "u.jsonl", *options)[3:]
    subprocess.run([*launch, *arguments], check=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (tmp_path / "u.jsonl").read_bytes() == (undisturbed / "u.jsonl").read_bytes()


# ---------------------------------------------------------------------------------------------------- k-means


def test_kmeans(model: DinoSR, checkpoint: Path, tmp_path: Path) -> None:
    files = sorted(PROMPTS.iterdir())[:30]
    batched = Options(batch_seconds=30, progress=False)
    for name, options in (("a", QUIET), ("b", QUIET)):
        fit_kmeans(
            files, tmp_path / f"{name}.npz", model=checkpoint, layer=2, units=10, max_frames=5000, options=options
        )
    assert (tmp_path / "a.npz").read_bytes()[:4] == b"PK\x03\x04"
    with np.load(tmp_path / "a.npz", allow_pickle=False) as a, np.load(tmp_path / "b.npz", allow_pickle=False) as b:
        np.testing.assert_array_equal(a["centroids"], b["centroids"])
        centroids, made = a["centroids"], json.loads(str(a["made"]))
    assert centroids.shape == (10, 32)
    assert made["layer"] == 2
    assert 4000 < made["frames"] <= 5000
    for name, options in (("alone", QUIET), ("batched", batched)):
        out = tmp_path / f"{name}.jsonl"
        extract_units(files, out, model=checkpoint, kmeans=tmp_path / "a.npz", options=options)
        found, inertia = units(out), 0.0
        for file in files:
            features = model.encode(read(file).unsqueeze(0), layer=2)[0][0].double().numpy()
            distances = ((features[:, None] - centroids) ** 2).sum(-1)
            chosen = distances[np.arange(len(features)), found[file.stem]]
            np.testing.assert_allclose(chosen, distances.min(-1), rtol=1e-5)
            inertia += distances.min(-1).mean()
        assert set().union(*found.values()) == set(range(10))
    assert (tmp_path / "alone.jsonl").read_bytes() == (tmp_path / "batched.jsonl").read_bytes()
    with pytest.raises(InputError, match="the centroids are of layer 2 of"):
        extract_units(files, tmp_path / "x.jsonl", model=checkpoint, layer=3, kmeans=tmp_path / "a.npz", options=QUIET)
    with pytest.raises(InputError, match=r"^units: found 1000000000, expected 2 to 1,048,576$"):
        fit_kmeans(files, tmp_path / "c.npz", model=checkpoint, units=10**9, max_frames=10**10, options=QUIET)
    with pytest.raises(InputError, match=r"^units: found 1, expected 2 to 1,048,576$"):
        fit_kmeans(files, tmp_path / "c.npz", model=checkpoint, units=1, options=QUIET)
    with pytest.raises(InputError, match=r"^max_frames: found 9, expected 10 at least, a frame for each unit$"):
        fit_kmeans(files, tmp_path / "c.npz", model=checkpoint, units=10, max_frames=9, options=QUIET)
    (tmp_path / "years.csv").write_text(f"fileid,path,num_samples\na,{files[0]},{10**14}\n")
    with pytest.raises(InputError, match=r"^1000000000000 frames: would take .* GiB"):
        fit_kmeans(
            tmp_path / "years.csv", tmp_path / "c.npz", model=checkpoint, layer=2, max_frames=10**12, options=QUIET
        )
    with pytest.raises(InputError, match="frames are too few for 4000 units: give more recordings"):
        fit_kmeans(files[:1], tmp_path / "c.npz", model=checkpoint, layer=2, units=4000, options=QUIET)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04")
    np.savez(tmp_path / "flat.npz", centroids=centroids[0], made=json.dumps(made))
    np.savez(tmp_path / "one.npz", centroids=centroids[:1], made=json.dumps(made))
    for name, reason in (
        ("bad", ""),
        ("flat", "not a matrix of finite numbers"),
        ("one", "there are no two centroids"),
    ):
        with pytest.raises(InputError, match=rf"{name}\.npz: no k-means model .*{reason}"):
            extract_units(files, tmp_path / "x.jsonl", model=checkpoint, kmeans=tmp_path / f"{name}.npz", options=QUIET)


def test_kmeans_of_what_cannot_be_encoded(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).write_bytes(b"no recording")
    options = Options(on_error="skip", progress=False)
    with pytest.raises(InputError, match=r"^none of 2 recordings could be encoded, the first one for this: .*a\.wav"):
        fit_kmeans(tmp_path, tmp_path / "k.npz", model=checkpoint, layer=2, units=2, options=options)


def test_kmeans_of_too_few_frames_by_choice(checkpoint: Path, tmp_path: Path) -> None:
    files = [noise(tmp_path / f"{i}.wav", 160_000, seed=i) for i in range(2)]
    for seed in range(10):  # of 998 frames, about 100 are drawn
        try:
            fit_kmeans(
                files,
                tmp_path / "k.npz",
                model=checkpoint,
                layer=2,
                units=100,
                max_frames=100,
                seed=seed,
                options=QUIET,
            )
        except InputError as error:
            assert re.fullmatch(r"\d\d frames are too few for 100 units: raise max_frames \(100\)", str(error))  # noqa: PT017
            return
    pytest.fail("never too few")


def test_frames_are_drawn_whatever_the_order() -> None:
    recordings = {f"{i}": np.arange(1000, dtype=np.float32)[:, None] + 1000 * i for i in range(20)}
    found = []
    for names in (list(recordings), list(recordings)[::-1]):
        draw, most = kmeans._Draw(500, 1.0, 0), 0
        for name in names:
            draw.add(name, recordings[name])
            most = max(most, draw.count)
        draw.reduce()
        assert most <= 625
        assert draw.count == 500
        found.append({name: frames.tolist() for name, (_, frames) in draw.drawn.items()})
    assert found[0] == found[1]
    assert all(5 < len(frames) < 60 for frames in found[0].values())


def test_without_scikit_learn(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sklearn", "sklearn.cluster"):
        monkeypatch.setitem(sys.modules, name, None)
    file, out = noise(tmp_path / "a.wav"), tmp_path / "k.npz"
    assert main(["kmeans", str(file), str(out), "--model", str(checkpoint), "--layer", "3"]) == 2
    assert capsys.readouterr().err == "error: `sklearn` is missing: install it with `pip install 'spidr[extract]'`\n"


# ---------------------------------------------------------------------------------------------------- in pieces


def test_ahead_keeps_the_order_and_its_distance() -> None:
    asked: list[int] = []

    def items() -> Any:
        for i in range(50):
            asked.append(i)
            yield i

    def work(i: int) -> int:
        time.sleep(0.002 * (i % 3))
        return i * i

    for done, result in enumerate(encoder.ahead(work, items(), workers=4, depth=6)):
        assert result == done * done
        assert len(asked) <= done + 7


def test_no_teacher_in_memory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = {}
    original = encoder.Encoder.run

    def run(self: encoder.Encoder, *args: Any) -> Any:
        seen.update(self.model.state_dict())
        return original(self, *args)

    monkeypatch.setattr(encoder.Encoder, "run", run)
    extract_units(noise(tmp_path / "a.wav"), tmp_path / "u.jsonl", model=checkpoint, layer=LAYER, options=QUIET)
    assert seen
    assert not any(name.startswith("teacher.") for name in seen)


def test_benchmark() -> None:
    """It runs, without the published package."""
    benchmark = Path(__file__).parents[1] / "benchmarks" / "extract.py"
    result = subprocess.run(
        [sys.executable, benchmark, PROMPTS, "--quick"], capture_output=True, text=True, timeout=200, check=True
    )
    table = [line.split("|") for line in result.stdout.splitlines() if line.startswith("|")]
    assert [cells[1].strip() for cells in table[2:]] == ["units of layer 6"] * 2 + ["features of layer 6"] * 2
    assert all(float(cells[3]) > 0 for cells in table[2:])

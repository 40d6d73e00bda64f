"""A recording's result does not depend on what happens around it."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.extraction import LAYER, PROMPTS, QUIET, SHAPES, noise, read, rows, small, units
from helpers.small_models import tiny_model
from spidr.extract import Options, extract_features, extract_units, features, fit_kmeans, session, units as units_module
from spidr.models import DinoSR, num_frames
from spidr.tools.errors import InputError


def nearly_tied(model_type: str) -> DinoSR:
    """A model whose codewords have near-duplicates, so that rounding, and so batching, decides which wins."""
    model = small(model_type)
    for head in model.heads:
        weight, bias = head[0].weight.data, head[0].bias.data
        weight[1::2] = weight[::2] * (1 + 1e-6 * torch.rand_like(weight[::2]))
        bias[1::2] = bias[::2]
    return model


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
    if model_type == "dinosr":
        return
    # Without the second look at near ties, some units would differ.
    monkeypatch.setattr(session, "NEAR", 0.0)
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
def test_a_manifest_without_lengths(seconds: float | None, model: DinoSR, checkpoint: Path, tmp_path: Path) -> None:
    """Windows still work, and k-means draws no more frames."""
    files = [noise(tmp_path / f"{i}.wav", samples, seed=i) for i, samples in enumerate((160_000, 96_000, 8000))]
    lines = [f"{file.stem},{file},{0 if i < 2 else 8000}" for i, file in enumerate(files)]
    (tmp_path / "m.csv").write_text("\n".join(["fileid,path,num_samples", *lines]))
    options = Options(window=2.0, context=0.5, batch_seconds=seconds, resample=True, progress=False)
    extract_features(tmp_path / "m.csv", tmp_path / "f", model=checkpoint, layer=LAYER, options=options)
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


def test_number_of_threads(checkpoint: Path, tmp_path: Path) -> None:
    files = [noise(tmp_path / f"{i}.wav", 4000) for i in range(20)]
    options = Options(threads=1000, progress=False)
    extract_units(files, tmp_path / "u.jsonl", model=checkpoint, layer=LAYER, options=options)
    assert len(rows(tmp_path / "u.jsonl")) == 20


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
    """Heads and strides change the result, training settings do not."""
    common: dict[str, Any] = {"extractor_conv_layer_config": SHAPES, "encoder_num_heads": 4}
    model, other = (tiny_model("spidr", 0, **common | changed).eval() for changed in ({}, changes))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    file = noise(tmp_path / "a.wav")
    extract_features(file, tmp_path / "f", model=model, layer=LAYER, options=QUIET)
    if "encoder_dropout" in changes:
        (tmp_path / "f" / "a.npy").unlink()
        extract_features(file, tmp_path / "f", model=other, layer=LAYER, options=QUIET)
    else:
        with pytest.raises(InputError, match="made with weights = "):
            extract_features(file, tmp_path / "f", model=other, layer=LAYER, options=QUIET)


@pytest.mark.parametrize("kind", ["features", "units"])
def test_no_thread_outlives_an_error(
    kind: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [noise(tmp_path / f"{i}.wav", seed=i) for i in range(30)]
    before = set(threading.enumerate())

    def fail(*_: object, **__: object) -> Any:
        raise InputError("no room")

    monkeypatch.setattr(features, "atomic_write", fail)
    monkeypatch.setattr(units_module, "Row", fail)
    extract: Any = extract_features if kind == "features" else extract_units
    options = Options(threads=2, progress=False)
    with pytest.raises(InputError, match="no room") as error:
        extract(files, tmp_path / "out.jsonl", model=checkpoint, layer=LAYER, options=options)
    assert set(threading.enumerate()) <= before
    del error  # it keeps the running frames alive


def test_ahead_keeps_the_order_and_its_distance() -> None:
    asked: list[int] = []

    def items() -> Any:
        for i in range(50):
            asked.append(i)
            yield i

    def work(i: int) -> int:
        time.sleep(0.002 * (i % 3))
        return i * i

    for done, result in enumerate(session.ahead(work, items(), workers=4, depth=6)):
        assert result == done * done
        assert len(asked) <= done + 7


def test_no_teacher_in_memory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = {}
    original = session.Session.run

    def run(self: session.Session, *args: Any) -> Any:
        seen.update(self.model.state_dict())
        return original(self, *args)

    monkeypatch.setattr(session.Session, "run", run)
    extract_units(noise(tmp_path / "a.wav"), tmp_path / "u.jsonl", model=checkpoint, layer=LAYER, options=QUIET)
    assert seen
    assert not any(name.startswith("teacher.") for name in seen)


def test_the_default_layer_of_a_small_model(checkpoint: Path, tmp_path: Path) -> None:
    file = noise(tmp_path / "a.wav")
    for extract, output, last in (
        (extract_units, "u.jsonl", "2 to 4 have a codebook"),
        (extract_features, "f", "1 to 4 exist"),
    ):
        with pytest.raises(InputError, match=f"^layer 6, the default, does not exist; layers {last}$"):
            extract(file, tmp_path / output, model=checkpoint, options=QUIET)

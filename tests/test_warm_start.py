"""The warm start: cepstra against a slow oracle, what is learned, and training that starts from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from scipy.fft import dct

from helpers.small_models import TINY
from helpers.tiny_run import write_config
from spidr.config import DEFAULT_CONV_LAYER_CONFIG, read_config
from spidr.data import speech_dataset
from spidr.data.write_manifest import write_manifest
from spidr.models import DinoSR, build_model, num_frames
from spidr.train import train
from spidr.warm_start import cepstra, main, smooth_and_slope, warm_start

STEPS = 200


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings that alternate between six tones every 50 ms."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (folder / "audio").mkdir()
    for index in range(24):
        tones = np.repeat(rng.integers(6, size=14), 800)
        samples = 0.05 * (1 + tones) * np.sin(2 * np.pi * np.cumsum(200 * 2.0**tones) / 16_000)
        soundfile.write(folder / "audio" / f"{index}.wav", samples, 16_000)
    write_manifest(folder / "audio", folder / "manifest.csv", ".wav")
    return folder / "manifest.csv"


def config(folder: Path, manifest: Path, name: str = "run", **sections: dict[str, Any]) -> Path:
    sections.setdefault("optimizer", {"max_steps": 3})
    model = {"extractor_mode": "group_norm", "extractor_conv_bias": True, "codebook_init": "data"}
    return write_config(folder, manifest, name, model=model, **sections)


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "spidr.warm_start", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def warm(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm")
    done = command(config(folder, manifest), folder / "warm.pt", "--steps", STEPS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{folder / 'warm.pt'}: 0.")
    return folder / "warm.pt"


@pytest.mark.parametrize("shapes", [DEFAULT_CONV_LAYER_CONFIG, TINY["extractor_conv_layer_config"]])
def test_cepstra_of_every_frame(shapes: list[tuple[int, int, int]]) -> None:
    hop, field, size = (320, 400, 512) if shapes is DEFAULT_CONV_LAYER_CONFIG else (40, 60, 64)
    waveforms = torch.randn(2, 4321, generator=torch.Generator().manual_seed(0))
    found = cepstra(waveforms, shapes)
    if shapes is DEFAULT_CONV_LAYER_CONFIG:
        assert found.shape == (2, num_frames(4321), 13)
    frequencies = np.arange(size // 2 + 1) * 16_000 / size
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 82) / 2595) - 1)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(field) / field)
    for t in (0, 1, found.shape[1] - 1):
        power = np.abs(np.fft.rfft(waveforms[1, t * hop : t * hop + field].numpy() * hann, size)) ** 2
        mels = [
            np.log(max(1e-6, float(power @ np.interp(frequencies, edges[m : m + 3], [0, 1, 0])))) for m in range(80)
        ]
        # The norms differ only in c0.
        expected = dct(mels, norm="ortho")[:13] * [np.sqrt(2), *[1] * 12]
        torch.testing.assert_close(found[1, t], torch.tensor(expected).float(), rtol=1e-3, atol=1e-3)


def test_smooth_and_slope() -> None:
    """Each row as if it were alone, with its first and last frame repeated forever."""
    x, lengths = torch.randn(3, 9, 2, generator=torch.Generator().manual_seed(0)), [9, 4, 1]
    found = smooth_and_slope(x, torch.tensor(lengths)).numpy()
    for row, length in enumerate(lengths):
        frames = np.pad(x[row, :length].numpy(), ((2, 2), (0, 0)), mode="edge")
        for t in range(length):
            a, b, c, d, e = frames[t : t + 5]
            np.testing.assert_allclose(found[row, t, :2], (a + 2 * b + 3 * c + 2 * d + e) / 9, atol=1e-6)
            np.testing.assert_allclose(found[row, t, 2:], (e + 2 * d - 2 * b - a) / 6, atol=1e-6)


def unexplained(model: DinoSR, manifest: Path) -> float:
    """Share of the smoothed cepstra's variance that a linear map of the last layer leaves, on whole recordings."""
    dataset = speech_dataset(manifest, normalize=True)
    waveforms = [dataset[row].unsqueeze(0) for row in range(len(dataset))]
    features = torch.cat(
        [model.eval().encode(waveform, layer=len(model.student.layers))[0][0] for waveform in waveforms]
    )
    smooth = []
    for waveform in waveforms:
        x = cepstra(waveform, model.cfg.extractor_conv_layer_config)
        smooth.append(smooth_and_slope(x, torch.tensor([x.shape[1]]))[0, :, :13])
    targets = torch.cat(smooth)
    targets = (targets - targets.mean(0)) / targets.std(0)
    inputs = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    return (targets - inputs @ torch.linalg.lstsq(inputs, targets).solution).square().mean().item()


def test_little_variance_is_left(warm: Path, manifest: Path) -> None:
    model = build_model(checkpoint=warm)
    share = unexplained(model, manifest)
    assert share < 0.1
    assert share < 0.6 * unexplained(build_model(cfg=model.cfg), manifest)


def test_more_steps_leave_less_variance(manifest: Path, tmp_path: Path) -> None:
    cfg = read_config(config(tmp_path, manifest))
    first, later = (warm_start(cfg, tmp_path / f"{steps}.pt", steps=steps, device="cpu") for steps in (1, 100))
    assert later < 0.7 < first


def test_training_starts_from_it(warm: Path, manifest: Path, tmp_path: Path) -> None:
    path = config(tmp_path, manifest, run={"init_ckpt": str(warm), "save_interval": 1})
    document = json.loads(path.read_text())
    document["model"]["freeze_step"] = 0
    path.write_text(json.dumps(document))
    train(read_config(path))
    run = tmp_path / "p" / "run"
    expected = torch.load(warm, weights_only=True)["model"]
    first, last = (torch.load(run / name, weights_only=True)["model"] for name in ("step_0.pt", "final.pt"))
    assert first.keys() == expected.keys()
    assert [name for name in first if not torch.equal(first[name], expected[name])] == []
    extractor = [name for name in first if name.startswith(("feature_extractor", "feature_projection"))]
    assert all(torch.equal(last[name], expected[name]) for name in extractor)
    assert not torch.equal(
        last["student.layers.0.feed_forward.output_dense.weight"],
        expected["teacher.layers.0.feed_forward.output_dense.weight"],
    )


def test_the_heads_are_those_of_a_new_run(warm: Path, manifest: Path, tmp_path: Path) -> None:
    cfg = read_config(config(tmp_path, manifest))
    torch.manual_seed(cfg.run.random_seed)
    cold = build_model(cfg=cfg.model).state_dict()
    found = torch.load(warm, weights_only=True)["model"]
    changed = {name.split(".")[0] for name in cold if not torch.equal(cold[name], found[name])}
    assert changed == {"feature_extractor", "feature_projection", "student", "teacher", "codebooks"}
    assert {name for name in cold if name.startswith("heads")}
    for name in found:
        assert not name.startswith("student") or torch.equal(found[name], found[name.replace("student", "teacher")])


@pytest.mark.parametrize("padding", [False, True])
def test_same_seed_same_bytes(manifest: Path, tmp_path: Path, padding: bool) -> None:
    data = {"enable_padding": padding}
    written = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        path = config(tmp_path, manifest, run={"random_seed": seed}, data=data)
        assert main([str(path), str(tmp_path / name / "warm.pt"), "--steps", "3"]) == 0
        written.append((tmp_path / name / "warm.pt").read_bytes())
    assert written[0] == written[1] != written[2]


def test_wrong_configuration(manifest: Path, tmp_path: Path) -> None:
    done = command(config(tmp_path, manifest, run={"model_type": "spidrr"}), tmp_path / "warm.pt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'run.json'}: run.model_type: found 'spidrr'")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "warm.pt").exists()


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.split("\r")[-1].splitlines()[-1]  # after the progress bar, if there was one
    assert error.startswith("error: ")
    return error


def test_mistakes_are_refused_before_training(
    warm: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, manifest)
    assert "at least 1, not 0" in refused(capsys, path, tmp_path / "warm.pt", "--steps", "0")
    assert f"{warm}: exists" in refused(capsys, path, warm)
    other = refused(capsys, config(tmp_path, manifest, run={"random_seed": 3}), warm.with_name("other.pt"))
    assert f"{warm.with_name('config.json')}: is of another run" in other
    assert "lr: found nan" in refused(capsys, path, tmp_path / "warm.pt", "--lr", "nan")
    assert "must end in .pt" in refused(capsys, path, tmp_path / "warm.safetensors")
    assert "name is too long" in refused(capsys, path, tmp_path / f"{'a' * 245}.pt")
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    assert "config.json: cannot be read" in refused(capsys, path, tmp_path / "folder" / "warm.pt")
    large = json.loads(path.read_text())
    large["model"]["codebook_size"] = 100_000
    (tmp_path / "large.json").write_text(json.dumps(large))
    assert "too few to draw 100000 codewords" in refused(capsys, tmp_path / "large.json", tmp_path / "l" / "warm.pt")
    assert "no-manifest.csv" in refused(capsys, config(tmp_path, tmp_path / "no-manifest.csv"), tmp_path / "warm.pt")
    assert not (tmp_path / "warm.pt").exists()


def test_a_loss_that_is_not_finite(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(tmp_path, manifest)
    assert "lower --lr" in refused(capsys, path, tmp_path / "warm.pt", "--steps", "20", "--lr", "1e30")
    assert not (tmp_path / "warm.pt").exists()

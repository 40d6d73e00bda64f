"""paper/extract_features.py writes OUTPUT/<stem>.pt, whatever folders the recordings are in."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from helpers.small_models import tiny_model
from spidr.data.write_manifest import write_manifest

PAPER = Path(__file__).parents[2] / "paper"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = tiny_model()
    document = {"run": {"model_type": "spidr"}, "model": dataclasses.asdict(model.cfg)}
    (tmp_path / "config.json").write_text(json.dumps(document))
    torch.save({"model": model.state_dict()}, tmp_path / "final.pt")
    return tmp_path / "final.pt"


def test_extract_features(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PAPER)
    rng = np.random.default_rng(0)
    for name in ("84/121/84-121-0000", "84/121/84-121-0001", "251/7/251-7-0000"):
        path = tmp_path / "dev-clean" / f"{name}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(24_000), 16_000)
    write_manifest(tmp_path / "dev-clean", tmp_path / "dev-clean.csv", ".flac")
    main = importlib.import_module("extract_features").main
    arguments = [str(tmp_path / "dev-clean.csv"), str(tmp_path / "out"), "--layer", "2", "--device", "cpu"]
    assert main([*arguments, "--checkpoint", str(checkpoint)]) == 0
    names = {path.name for path in (tmp_path / "out").rglob("*.pt")}
    assert names == {path.name for path in (tmp_path / "out").glob("*.pt")}
    assert names == {"84-121-0000.pt", "84-121-0001.pt", "251-7-0000.pt"}
    features = torch.load(tmp_path / "out" / "84-121-0000.pt", weights_only=True)
    waveform, _ = soundfile.read(tmp_path / "dev-clean/84/121/84-121-0000.flac", dtype="float32")
    expected, _ = tiny_model().eval().encode(torch.from_numpy(waveform)[None], torch.tensor([24_000]), layer=2)
    assert features.dtype == torch.float32
    assert torch.allclose(features, expected[0], atol=1e-5)


def test_mistakes_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(PAPER)
    main = importlib.import_module("extract_features").main
    assert main([str(tmp_path / "none.csv"), str(tmp_path / "out"), "--checkpoint", "none.pt"]) == 2
    assert "none" in capsys.readouterr().err

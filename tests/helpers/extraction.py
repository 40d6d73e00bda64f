"""Small models, recordings, and readers of what was extracted."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from helpers.small_models import tiny_model
from spidr.config import DEFAULT_CONV_LAYER_CONFIG
from spidr.extract import Options
from spidr.models import DinoSR

PROMPTS = Path(__file__).parents[2] / "examples" / "quickstart" / "audio"
LAYER = 3
SHAPES = [(16, kernel, stride) for _, kernel, stride in DEFAULT_CONV_LAYER_CONFIG]
QUIET = Options(progress=False)


def save(model: DinoSR, folder: Path) -> Path:
    """Save a checkpoint with its configuration beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict()}, folder / "model.pt")
    document = {"model_type": type(model).__name__.lower(), "model": asdict(model.cfg)}
    (folder / "config.json").write_text(json.dumps(document))
    return folder / "model.pt"


def small(model_type: str = "spidr", seed: int = 0) -> DinoSR:
    """A tiny model with 50 frames a second."""
    return tiny_model(model_type, seed, extractor_conv_layer_config=SHAPES).eval()


def read(path: Path) -> torch.Tensor:
    return torch.from_numpy(soundfile.read(path, dtype="float32")[0])


def noise(path: Path, samples: int = 8000, rate: int = 16_000, seed: int = 0, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = 0.1 * np.random.default_rng((seed, samples)).standard_normal((samples, channels))
    soundfile.write(path, values, rate)
    return path


def rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["fileid"]: row for row in map(json.loads, path.read_text("utf-8").splitlines())}


def units(path: Path) -> dict[str, list[int]]:
    return {name: row["units"] for name, row in rows(path).items()}

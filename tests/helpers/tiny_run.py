"""A whole run small enough for tests: recordings, manifest, configuration, and results to compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from helpers.small_models import TINY
from spidr.data.write_manifest import write_manifest
from spidr.tools.metrics import read_metrics

MEASURED = {"audio_seconds_per_second", "data_wait_share", "peak_memory_gib", "tflops"}


def write_recordings(folder: Path, count: int = 24) -> Path:
    """Write noise of up to 0.75 s and its manifest. Returns the manifest's path."""
    rng = np.random.default_rng(0)
    (folder / "audio").mkdir(parents=True)
    for index in range(count):
        soundfile.write(folder / "audio" / f"{index}.wav", 0.1 * rng.standard_normal(rng.integers(4000, 12000)), 16_000)
    write_manifest(folder / "audio", folder / "manifest.csv", ".wav")
    return folder / "manifest.csv"


def write_config(folder: Path, manifest: Path, name: str = "run", **sections: dict[str, Any]) -> Path:
    """Write ``NAME.json``, which trains in ``folder/p/NAME`` and validates on its training data."""
    data = {"manifest": str(manifest), "max_sample_size": 12_000, "max_batch_length": 24_000, "num_workers": 0}
    document: dict[str, dict[str, Any]] = {
        "run": {
            "workdir": str(folder),
            "wandb_project": "p",
            "wandb_name": name,
            "wandb_mode": "disabled",
            "model_type": "spidr",
            "compile": False,
            "device": "cpu",
            "log_interval": 1,
            "save_interval": 20,
        },
        "data": {**data, "num_buckets": 3},
        "validation": {"dev": data},
        "optimizer": {"dtype": "float32", "max_steps": 40, "warmup_steps": 5, "hold_steps": 10, "decay_steps": 25},
        "model": dict(TINY),
    }
    for section, table in sections.items():
        document[section] = document.get(section, {}) | table
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document))
    return path


def outcome(run_dir: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """A finished run's weights and the training lines of its metrics, without times and rates."""
    weights = torch.load(run_dir / "final.pt", weights_only=True)["model"]
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["group"] == "train"]
    return weights, [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def assert_same_outcome(run_dir: Path, other: Path) -> None:
    """Check that two runs ended with the same bits."""
    (weights, lines), (other_weights, other_lines) = outcome(run_dir), outcome(other)
    assert weights.keys() == other_weights.keys()
    assert [key for key in weights if not torch.equal(weights[key], other_weights[key])] == []
    assert lines == other_lines

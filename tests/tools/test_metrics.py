"""Metrics: each line once, whatever is killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spidr.tools.errors import InputError
from spidr.tools.metrics import MetricsFile, read_metrics


def test_lines_after_the_checkpoint_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [(5, "train"), (10, "train"), (10, "dev"), (15, "train")]
    path.write_text("".join(f'{{"step": {s}, "group": "{g}", "loss": 1}}\n' for s, g in lines) + '{"step": 20, "gr')
    metrics = MetricsFile(path, step=10)
    assert (10, "dev") in metrics
    assert (15, "train") not in metrics
    assert not metrics.write({"step": 10, "group": "dev", "loss": 2})
    assert metrics.write({"step": 15, "group": "train", "loss": 2})
    assert [(line["step"], line["group"], line["loss"]) for line in read_metrics(path)] == [
        (5, "train", 1), (10, "train", 1), (10, "dev", 1), (15, "train", 2)
    ]  # fmt: skip


def test_lines_are_json(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.write({"step": 1, "group": "train", "loss": float("nan"), "pnmi": 0.1 + 0.2})
    assert json.loads(metrics.path.read_text()) == {"step": 1, "group": "train", "loss": None, "pnmi": 0.1 + 0.2}


def test_full_disk(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.path = Path("/dev/full")
    with pytest.raises(InputError, match="/dev/full: cannot be written \\(No space left on device\\)"):
        metrics.write({"step": 1, "group": "train"})

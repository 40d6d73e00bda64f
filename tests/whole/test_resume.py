"""A run that is killed and restarted ends with the same bits as an undisturbed one."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.processes import Fault, Ranks, assert_same_run, complete, outcome
from helpers.tiny_run import write_config, write_recordings
from spidr.tools.metrics import read_metrics

PREEMPTED = 75
SETTINGS: dict[str, Any] = {
    "run": {"save_interval": 4, "log_interval": 2},
    "optimizer": {"max_steps": 13},
    "model": {"freeze_step": 6, "encoder_layer_drop": 0.2, "codebook_revive_after": 2},
    "data": {"num_workers": 1},
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("data") / "recordings", count=24)


@pytest.mark.parametrize(
    ("world_size", "model_type", "accumulation", "faults"),
    [
        (
            1,
            "spidr",
            1,
            [
                (Fault("checkpoint", 1), -9),  # of the untrained model
                (Fault("step", 3), -9),
                (Fault("step", 6, signal.SIGTERM), PREEMPTED),  # saved just after the extractor was frozen
                (Fault("checkpoint", 1), -9),
                (Fault("validation", 1, signal.SIGUSR2), PREEMPTED),
                (Fault("step", 2, worker=True), 2),  # told in one line
            ],
        ),
        (
            2,
            "dinosr",
            2,
            [
                (Fault("step", 6, rank=1), -9),
                (Fault("validation", 1, signal.SIGUSR1, rank=1), PREEMPTED),
                (Fault("step", 3, rank=None), -9),
            ],
        ),
    ],
)
def test_killed_and_restarted(
    tmp_path: Path,
    manifest: Path,
    world_size: int,
    model_type: str,
    accumulation: int,
    faults: list[tuple[Fault, int]],
) -> None:
    sections = {name: dict(table) for name, table in SETTINGS.items()}
    sections["run"]["model_type"] = model_type
    sections["data"]["global_batch_length"] = 24_000 * world_size * accumulation
    undisturbed = complete(write_config(tmp_path, manifest, "undisturbed", **sections), world_size)
    config = write_config(tmp_path, manifest, "killed", **sections)
    for fault, status in faults:
        ranks = Ranks(config, world_size, fault)
        statuses = ranks.wait()
        assert status in statuses, f"{fault}\n{ranks.log.read_text()}"
        assert status != PREEMPTED or set(statuses) == {PREEMPTED}
    assert_same_run(complete(config, world_size), undisturbed)
    lines = read_metrics(undisturbed / "metrics.jsonl")
    trained = [line["step"] for line in lines if line["group"] == "train"]
    assert trained == [2, 4, 6, 8, 10, 12, 13]  # the last interval is a short one
    assert [line["step"] for line in lines if line["group"] == "dev"] == [0, 4, 8, 12, 13]
    assert max(line.get("epoch", 0) for line in lines) > 0


def test_resumes_on_another_number_of_processes(tmp_path: Path, manifest: Path) -> None:
    """At the same place in the data, so with the same result up to rounding (dropout is off)."""
    sections: dict[str, Any] = {
        "run": {"save_interval": 100, "log_interval": 1},
        "optimizer": {"max_steps": 9},
        "data": {"global_batch_length": 48_000},
        "model": {"encoder_dropout": 0.0, "encoder_attention_dropout": 0.0},
    }
    undisturbed = complete(write_config(tmp_path, manifest, "undisturbed", **sections))
    config = write_config(tmp_path, manifest, "moved", **sections)
    ranks = Ranks(config, fault=Fault("step", 5, signal.SIGTERM))
    assert ranks.wait() == [PREEMPTED], ranks.log.read_text()
    (checkpoint, lines), (expected, expected_lines) = outcome(complete(config, 2)), outcome(undisturbed)
    for name, value in expected["model"].items():
        torch.testing.assert_close(checkpoint["model"][name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m)
    for key in ("position", "epoch", "step"):
        assert checkpoint[key] == expected[key]
    assert [line["batch_size"] for line in lines if line["group"] == "train"] == [
        line["batch_size"] for line in expected_lines if line["group"] == "train"
    ]

"""A run that is killed and started again ends with the same bits as one that never stopped."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from processes import Fault, Ranks, assert_same_run, complete
from spidr.tools.metrics import read_metrics
from tiny_run import write_config, write_recordings

PREEMPTED = 75
SETTINGS: dict[str, Any] = {
    "run": {"save_interval": 5, "log_interval": 2},
    "optimizer": {"max_steps": 18},
    "model": {"freeze_step": 12, "encoder_layer_drop": 0.2},
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
                (Fault("checkpoint", 1), -9),  # the untrained model's
                (Fault("step", 4), -9),
                (Fault("step", 7, signal.SIGTERM), PREEMPTED),
                (Fault("checkpoint", 1), -9),
                (Fault("validation", 1), -9),  # just after freezing would be due in the next epoch
                (Fault("validation", 1, signal.SIGUSR2), PREEMPTED),
                (Fault("step", 3, worker=True), 1),
                (Fault("step", 4, signal.SIGUSR1), PREEMPTED),
            ],
        ),
        (
            2,
            "dinosr",
            2,
            [
                (Fault("step", 7, rank=1), -9),
                (Fault("validation", 1, signal.SIGUSR1, rank=1), PREEMPTED),
                (Fault("step", 9, rank=None), -9),
                (Fault("step", 5, signal.SIGTERM, rank=1), PREEMPTED),
            ],
        ),
    ],
)
def test_killed_and_started_again(
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
        assert status in ranks.wait(), f"{fault}\n{ranks.log.read_text()}"
    assert_same_run(complete(config, world_size), undisturbed)
    lines = read_metrics(undisturbed / "metrics.jsonl")
    trained = [line["step"] for line in lines if line["group"] == "train"]
    assert trained == list(range(2, 19, 2))
    assert [line["step"] for line in lines if line["group"] == "dev"] == [0, 5, 10, 15, 18]
    assert lines[-1]["epoch"] > 1

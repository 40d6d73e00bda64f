"""Meters, profiler, logger, and the functions that published training loops call."""

import logging
import math
import os
import random
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, SequentialLR

from spidr.checkpoint import find_checkpoints, remove_param_group
from spidr.config import OptimizerConfig
from spidr.environment import set_seed, setup_environment, setup_pytorch, setup_training
from spidr.models.metrics import NonFiniteError, params_norm, perplexities
from spidr.optimizer import build_optimizer, build_scheduler
from spidr.tools import AverageMeters, init_logger, profiler_context


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Restore what these functions change in the process."""
    environ, root = dict(os.environ), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    torch.use_deterministic_algorithms(mode=False)
    os.environ.clear()
    os.environ.update(environ)
    root.handlers[:], root.level = handlers, level


def test_meters() -> None:
    meters = AverageMeters(["loss", "size"], device=torch.device("cpu"))
    meters.update(loss=torch.tensor(1.0), size=3)
    meters.update(loss=torch.tensor(2.0))
    assert meters["loss"].count == 2
    assert meters.pop() == {"loss": 1.5, "size": 3.0}
    assert math.isnan(meters.pop()["loss"])
    meters.update(size=2)
    meters.reset()
    assert math.isnan(meters.pop()["size"])
    with pytest.raises(KeyError):
        meters.update(other=1)


def test_profiler(tmp_path: Path) -> None:
    with profiler_context(None) as profiler:
        profiler.step()
    path = tmp_path / "run" / "trace.html"
    path.parent.mkdir()
    with profiler_context(path, skip_first=1, warmup=1, active=1) as profiler:
        for _ in range(4):
            torch.ones(2).sum()
            profiler.step()
    assert path.read_text().lstrip().lower().startswith("<!doctype html>")


def test_logger(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    init_logger()
    init_logger(tmp_path / "log.txt", with_colors=True)
    logging.getLogger("package").info("known")
    logging.getLogger("spidr.data").warning("wrong")
    out, err = capfd.readouterr()
    assert out.count("known") == out.count("wrong") == err.count("wrong") == 1
    assert "known" not in err
    assert [line.split(" - ")[1:] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        ["INFO", "package", "known\x1b[0m"],
        ["WARNING", "spidr.data", "wrong\x1b[0m"],
    ]


def test_seed_and_environment() -> None:
    draws = []
    for _ in range(2):
        set_seed(3)
        draws.append((torch.rand(1).item(), random.random(), np.random.rand()))
    assert draws[0] == draws[1]
    torch.manual_seed(3)
    assert torch.rand(1).item() == draws[0][0]
    setup_environment(SPIDR_TEST="1")
    assert os.environ["SPIDR_TEST"] == "1"
    setup_pytorch(use_deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    setup_pytorch(use_deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_training_alone_and_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for _ in range(2):  # the second time with the variables set by the first
        setup_training(5)
        assert (dist.get_rank(), dist.get_world_size(), os.environ["LOCAL_RANK"]) == (0, 1, "0")
        assert torch.initial_seed() == 5
        dist.destroy_process_group()


def test_checkpoints_are_sorted(tmp_path: Path) -> None:
    for name in ("step_10.pt", "step_9.pt", "final.pt", "step_0.pt", "step_x.pt", "other.pt"):
        (tmp_path / name).touch()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step_0.pt", "step_9.pt", "step_10.pt", "final.pt"]
    assert find_checkpoints(tmp_path / "nothing") == []


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.feature_extractor, self.head = nn.Linear(2, 2), nn.Linear(2, 2)


def sequential(optimizer: Any) -> SequentialLR:
    parts = [LambdaLR(optimizer, lambda step: 1.0), LambdaLR(optimizer, lambda step: 0.5)]
    return SequentialLR(optimizer, parts, milestones=[1])


@pytest.mark.parametrize("kind", ["ours", "theirs", "none"])
def test_a_parameter_group_is_removed(kind: str) -> None:
    model = Tiny()
    optimizer, _, scheduler = build_optimizer(model, OptimizerConfig(warmup_steps=0))
    if kind == "theirs":
        scheduler = sequential(optimizer)  # type: ignore[assignment]
    model.head(model.feature_extractor(torch.ones(1, 2))).sum().backward()
    optimizer.step()
    before = model.feature_extractor.weight.clone()
    remove_param_group(optimizer, *([] if kind == "none" else [scheduler]), 1)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert torch.equal(before, model.feature_extractor.weight)
    assert len(optimizer.state) == 2
    assert [len(group["params"]) for group in optimizer.param_groups] == ([2, 0] if kind == "none" else [2])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2.5e-4 if kind == "theirs" else 5e-4)


def test_scheduler() -> None:
    model = Tiny()
    optimizer, _, scheduler = build_optimizer(model, OptimizerConfig())
    assert build_scheduler(optimizer, OptimizerConfig()).get_last_lr() == scheduler.get_last_lr()


def test_norms_and_perplexities() -> None:
    assert params_norm([torch.tensor([3.0, 4.0]), torch.tensor([12.0])]) == 13
    assert params_norm(torch.tensor([3.0, 4.0])) == 5
    assert params_norm(iter([torch.tensor([3.0, -5.0])]), math.inf) == 5
    assert params_norm(nn.Linear(3, 2).parameters()).dim() == 0
    assert params_norm([torch.tensor([math.nan])]).isnan()
    with pytest.raises(NonFiniteError):
        params_norm([torch.tensor([math.inf])], error_if_nonfinite=True)
    distributions = [torch.eye(4), torch.full((3, 4), 0.25), torch.eye(4)[:1]]
    assert perplexities(distributions).tolist() == pytest.approx([4, 4, 1])


def test_settings_from_a_command_line() -> None:
    from spidr.slurm import slurm_config_parse_args

    args = Namespace(account="a", nodes=1, gpus_per_node=2, cpus_per_task=None, time=10, configs=[], dump="x")
    config = slurm_config_parse_args(args)
    assert (config["account"], config["nodes"], config["gpus_per_node"], config["time"]) == ("a", 1, 2, 10)

"""Schedules against their formulas; parameter groups; freezing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from helpers.small_models import GoldenCase, tiny_model
from spidr.config import OptimizerConfig
from spidr.optimizer import build_optimizer, drop_frozen, lr_factor


def expected_factor(s: int, scheduler: str, w: int, h: int, d: int, f: float, init: float, last: int) -> float:
    """Learning rates from the formulas, case by case."""
    timescale, shift = 50, 7
    if scheduler == "rsqrt":
        top = 1 / math.sqrt(1 + shift / timescale)
        if s < w:
            return init + (top - init) * (s / w)
        if s < w + h:
            return 1.0
        return 1 / math.sqrt(1 + (s - w - h + shift) / timescale)
    if s < w:
        return init + (1 - init) * (s / w)
    if scheduler == "tristage":
        return 1.0 if s < w + h else f ** min(1.0, (s - w - h) / d)
    if scheduler == "cosine":
        return f + (1 - f) * (1 + math.cos(math.pi * (s - w) / (last - w))) / 2
    return 1.0


@pytest.mark.parametrize("scheduler", ["tristage", "cosine", "rsqrt", "constant"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_learning_rates_in_use(scheduler: Any, warmup: int) -> None:
    cfg = OptimizerConfig(
        lr=0.1, init_lr_scale=0.02, final_lr_scale=0.05, max_steps=60, warmup_steps=warmup, hold_steps=15,
        decay_steps=30, rsqrt_timescale=50, rsqrt_shift=7, scheduler=scheduler,
    )  # fmt: skip
    optimizer, _, schedule = build_optimizer(nn.Linear(2, 2), cfg)
    for step in range(61):  # tristage stays at its floor from 55 on
        expected = 0.1 * expected_factor(step, scheduler, warmup, 15, 30, 0.05, 0.02, 60)
        assert schedule.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        assert schedule.get_last_lr()[0] == pytest.approx(expected, rel=1e-12)
        optimizer.step()
        schedule.step()


def test_cosine_stays_at_its_floor_past_the_end() -> None:
    cfg = OptimizerConfig(scheduler="cosine", max_steps=10, warmup_steps=2, final_lr_scale=0.1)
    assert lr_factor(30, cfg) == pytest.approx(0.1)


def test_paper_recipe() -> None:
    cfg = OptimizerConfig()
    factors = [lr_factor(step, cfg) for step in (0, 6_000, 12_000, 199_999, 300_000, 400_000)]
    assert factors == pytest.approx([0.01, 0.505, 1, 1, 0.1, 0.01])


def test_groups_of_a_model() -> None:
    model = tiny_model()
    optimizer, scaler, _ = build_optimizer(model, OptimizerConfig())
    names = {id(parameter): name for name, parameter in model.named_parameters() if not name.startswith("teacher.")}
    rest, to_freeze = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert to_freeze == [name for name in names.values() if name.startswith("feature_")]
    assert rest == [name for name in names.values() if not name.startswith("feature_")]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01]
    assert not scaler.is_enabled()


def test_model_that_no_prefix_matches() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    optimizer, scaler, schedule = build_optimizer(model, OptimizerConfig(dtype="bfloat16"))
    assert [len(group["params"]) for group in optimizer.param_groups] == [4]
    assert not scaler.is_enabled()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedule.step()
    drop_frozen(optimizer, schedule)  # there is nothing to freeze
    assert len(optimizer.param_groups) == 1


def test_scaler_is_for_float16() -> None:
    _, scaler, _ = build_optimizer(nn.Linear(2, 2), OptimizerConfig(dtype="float16"))
    assert scaler.is_enabled()


def test_frozen_parameters_leave_no_state(golden: GoldenCase) -> None:
    model = golden.model().train()
    optimizer, _, schedule = build_optimizer(model, OptimizerConfig(lr=1e-3, warmup_steps=0))
    waveforms, mask = golden.tensors["train_waveforms"][0], golden.tensors["masks"][0]
    extractor = {name: value.clone() for name, value in model.feature_extractor.state_dict().items()}
    for step in range(4):
        loss, _ = model(waveforms, mask=mask)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step == 1:
            assert any(not torch.equal(extractor[n], v) for n, v in model.feature_extractor.state_dict().items())
            with_state = len(optimizer.state_dict()["state"])
            frozen = {name: value.clone() for name, value in model.feature_extractor.state_dict().items()}
            model.freeze_extractor()
            drop_frozen(optimizer, schedule)
    state = optimizer.state_dict()
    assert len(state["param_groups"]) == 1
    in_group = {index for group in state["param_groups"] for index in group["params"]}
    assert state["state"].keys() <= in_group
    assert len(state["state"]) < with_state
    assert all(torch.equal(frozen[name], value) for name, value in model.feature_extractor.state_dict().items())
    assert len(schedule.get_last_lr()) == 1

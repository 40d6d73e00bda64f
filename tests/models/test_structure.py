"""The operators and collectives of a training step: what makes it fast on a GPU."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.operators import Operators
from helpers.processes import complete
from helpers.small_models import tiny_model
from helpers.tiny_run import write_config, write_recordings
from spidr.config import OptimizerConfig
from spidr.models import DinoSR, kernels
from spidr.optimizer import build_optimizer
from spidr.train import Hooks, State

WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")
BATCH, SAMPLES, MASKED = 2, 4000, 30


def forward(model: DinoSR) -> Tensor:
    return model(torch.randn(BATCH, SAMPLES), mask=torch.arange(MASKED).repeat(BATCH, 1))[0]


@pytest.mark.parametrize("mode", ["layer_norm", "group_norm"])
@pytest.mark.parametrize("model_type", ["spidr", "dinosr"])
def test_nothing_in_a_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, model_type: str, mode: str) -> None:
    """Runs a GPU's code, backward pass included, on tensors without values: reading a value fails."""
    monkeypatch.setattr(kernels, "is_lean", lambda _: False)
    with FakeTensorMode():
        model = tiny_model(model_type, extractor_mode=mode, encoder_projection_dropout=0.1).train()
        optimizer, _, _ = build_optimizer(model, OptimizerConfig())
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        frames = model.feature_extractor.num_frames(SAMPLES)
        options = {  # all inputs that a step may get
            "mask": torch.arange(MASKED).repeat(BATCH, 1),
            "attention_mask": torch.ones(BATCH, 1, 1, frames, dtype=torch.bool),
            "lengths": torch.full((BATCH,), SAMPLES),
            "channel_mask": torch.zeros(BATCH, 32, dtype=torch.bool),
        }
        for model.defer_codebook_updates in (False, True):
            with Operators() as operators:
                with torch.autocast("cpu", torch.bfloat16):
                    loss, _ = model(torch.randn(BATCH, SAMPLES), **options)
                loss.mean().backward()
                nn.utils.clip_grad_norm_(parameters, 10.0)
                optimizer.step()
                model.update_ema(1)
            assert not operators.names().intersection(WAITING)
            assert {"_foreach_lerp_", "_foreach_copy_", "_fused_adamw_"} <= operators.names()


@pytest.mark.parametrize("model_type", ["spidr", "dinosr"])
def test_heads_and_codebooks_are_products_over_all_at_once(model_type: str) -> None:
    model = tiny_model(model_type).train()
    size, total, frames = model.cfg.codebook_size, model.num_codebooks, BATCH * MASKED
    with Operators() as operators, torch.autocast("cpu", torch.bfloat16):
        forward(model)
    distances = [x for x in operators.outputs("baddbmm") if x.shape == (total, frames, size)]
    float32 = [x for x in distances if x.dtype == torch.float32]
    assert len(float32) == 1  # under autocast too
    assert len(distances) - len(float32) == (model_type == "spidr")
    assert not [x for x in operators.outputs("mm", "addmm", "bmm") if x.shape == (frames, size)]
    # Targets are integers, one per frame and codebook.
    assert not [x for _, x in operators.log if isinstance(x, Tensor) and not x.is_floating_point()
                and x.shape[-1:] == (size,) and x.numel() >= frames * size]  # fmt: skip
    assert operators.outputs("argmax")[-1].shape == (total, frames)
    assert not operators.names() & {"one_hot", "_cdist_forward", "cdist"}


def _count_collectives(output: Path) -> Hooks:
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def after_step(state: State) -> None:
        if state.step == 1:
            profiler.start()
        elif state.step == 2:
            profiler.stop()
            names = [event.name for event in profiler.events() if event.name.startswith("gloo:")]
            sizes = state.network._get_ddp_logging_data()["rebuilt_bucket_sizes"]  # type: ignore[union-attr,operator]
            if state.env.is_main:
                output.write_text(json.dumps([names, len(str(sizes).split(","))]), encoding="utf-8")

    return Hooks(after_step=after_step)


def test_a_step_reduces_its_gradients_and_one_buffer(tmp_path: Path) -> None:
    run = {"log_interval": 100, "save_interval": 100}
    optimizer = {"max_steps": 3, "warmup_steps": 1, "hold_steps": 1, "decay_steps": 1}
    config = write_config(tmp_path, write_recordings(tmp_path), run=run, optimizer=optimizer)
    hooks: Callable[[], Hooks] = partial(_count_collectives, tmp_path / "counts.json")
    complete(config, 2, hooks=hooks)
    names, buckets = json.loads((tmp_path / "counts.json").read_text())
    assert names == ["gloo:all_reduce"] * (buckets + 1)

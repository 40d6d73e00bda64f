"""The compiled forward: code that serves all batches, and that does not depend on which of them come first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from small_models import tiny_model
from spidr.compiled import Compiled
from spidr.config import Config, read_config
from spidr.models import DinoSR
from spidr.tools.frames import conv_length
from tiny_run import write_config

SIZES = [(3, 7011), (4, 11_900), (2, 5003), (7, 4000)]


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    return read_config(write_config(tmp_path, tmp_path / "none.csv"))


@pytest.fixture
def model() -> Iterator[DinoSR]:
    convolutions = [(16, 10, 5), (16, 8, 8)]
    model = tiny_model(encoder_num_layers=1, num_codebooks=1, extractor_conv_layer_config=convolutions).train()
    model.reduction = lambda _: None
    torch._dynamo.reset()
    counters.clear()
    yield model
    torch._dynamo.reset()


def step(model: DinoSR, call: Callable[..., tuple[Tensor, object]], rows: int, samples: int, **more: Tensor) -> Tensor:
    """All numbers that a training step with random data of this size gives."""
    torch.manual_seed(samples)
    frames = model.feature_extractor.num_frames(samples)
    mask = torch.stack([torch.randperm(frames)[: frames // 2].sort().values for _ in range(rows)])
    model.zero_grad()
    options = {"attention_mask": None, "lengths": None, "channel_mask": None} | more
    loss, _ = call(torch.randn(rows, samples), mask=mask, **options)
    loss.sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    statistics = model.statistics.flat.clone()
    model.discard_statistics()
    return torch.cat([loss, *gradients, statistics, torch.rand(1)])  # and where the generator has got to


def test_one_code_for_each_kind_of_batch(model: DinoSR, cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made up to compile for leaves no trace, neither in the model nor in random draws."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    monkeypatch.setattr("spidr.models.kernels.is_lean", lambda _: False)  # which compiled code never is
    compiled = Compiled(model, cfg)
    lengths = torch.tensor([7011, 4000, 5001])
    frames = conv_length(model.cfg.extractor_conv_layer_config, lengths)
    exist = torch.arange(model.feature_extractor.num_frames(7011)) < frames[:, None]
    padded = {"lengths": lengths, "attention_mask": exist[:, None, None]}
    graphs = []
    for rows, samples, more in [(*SIZES[0], {}), (*SIZES[1], {}), (1, 9000, {}), (*SIZES[0], padded), (*SIZES[2], {})]:
        expected = step(model, model, rows, samples, **more)
        assert torch.equal(step(model, compiled, rows, samples, **more), expected)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 2, 3, 3]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_first_batch_makes_no_difference(model: DinoSR, cfg: Config) -> None:
    """To the last bit, with the real compiler: so a run that goes on from a checkpoint is as one that never stopped."""
    results = []
    for sizes in (SIZES, SIZES[::-1]):
        torch._dynamo.reset()
        counters.clear()
        compiled = Compiled(model, cfg)
        results.append({size: step(model, compiled, *size) for size in sizes})
        assert counters["stats"]["unique_graphs"] <= 2  # small sums have a code of their own
    for size in SIZES:
        assert torch.equal(results[0][size], results[1][size])

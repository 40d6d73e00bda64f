"""The compiled forward that a GPU would run: one graph, few recompilations, same numbers, several processes."""

import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from helpers.ports import free_port
from helpers.small_models import tiny_model
from helpers.tiny_run import write_config
from spidr import compiled, state
from spidr.config import read_config
from spidr.environment import Environment
from spidr.models import DinoSR, kernels
from spidr.tools.frames import conv_length

LENGTHS = (1500, 1700, 4001, 1900, 2503)
NO_DROPOUT = {"encoder_dropout": 0.0, "encoder_attention_dropout": 0.0}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Disable what is for CPUs only, and clear the compiler's caches."""
    monkeypatch.setattr(kernels, "is_lean", lambda _: False)
    torch._dynamo.reset()
    counters.clear()
    splits = torch._dynamo.config.optimize_ddp
    yield
    torch._dynamo.config.optimize_ddp = splits
    torch._dynamo.reset()


def model_for(model_type: str, **settings: Any) -> DinoSR:
    convolutions = [(16, 10, 5), (16, 8, 8)]
    settings = {"encoder_num_layers": 1, "num_codebooks": 1, "extractor_conv_layer_config": convolutions} | settings
    model = tiny_model(model_type, **settings).train()
    model.reduction = lambda _: None
    return model


def batch(model: DinoSR, rows: int, samples: int, *, padded: bool) -> tuple[Tensor, dict[str, Any]]:
    """Waveforms and options as the training loop passes them."""
    frames = model.feature_extractor.num_frames(samples)
    options: dict[str, Any] = {"attention_mask": None, "lengths": None, "channel_mask": None}
    options["mask"] = torch.stack([torch.randperm(frames)[: frames // 2].sort().values for _ in range(rows)])
    if padded:
        options["lengths"] = torch.linspace(samples, samples - 300, rows).long()
        found = conv_length(model.cfg.extractor_conv_layer_config, options["lengths"])
        options["attention_mask"] = (torch.arange(frames) < found[:, None])[:, None, None]
    return torch.randn(rows, samples), options


@pytest.mark.parametrize(("model_type", "mode"), [("spidr", "layer_norm"), ("dinosr", "group_norm")])
def test_one_graph_for_all_sizes(model_type: str, mode: str) -> None:
    """For both kinds of batches, and for one row, which the compiler treats separately."""
    model = model_for(model_type, extractor_mode=mode, encoder_layer_norm_first=mode == "group_norm")
    call = compiled.compile_forward(model, backend="eager")
    graphs = []
    for padded in (False, True):
        for i, samples in enumerate(LENGTHS):
            waveforms, options = batch(model, 2 + i % 3, samples, padded=padded)
            call(waveforms, **options)[0].sum().backward()
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1] * 5 + [2] * 5
    waveforms, options = batch(model, 1, 2000, padded=False)
    call(waveforms, **options)
    assert counters["stats"]["unique_graphs"] == 3


def test_it_fails_if_the_compiler_would_give_up() -> None:
    model = model_for("spidr")
    call = compiled.compile_forward(model, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        waveforms, options = batch(model, 2, 1500, padded=False)
        call(waveforms, **options)
        waveforms, options = batch(model, 2, 1500, padded=True)
        with pytest.raises(Exception, match=r"recompile_limit|fullgraph"):
            call(waveforms, **options)


def test_gradients_equal_those_of_eager_code() -> None:
    """Through the joint graph of forward and backward, with the extractor's custom operation."""
    gradients = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = model_for("spidr", **NO_DROPOUT)
        call = compiled.compile_forward(model, backend="aot_eager") if compiles else model
        torch.manual_seed(1)
        waveforms, options = batch(model, 2, 1500, padded=False)
        call(waveforms, **options)[0].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")  # from one of the caches
def test_the_compiler_makes_one_graph_for_all_lengths() -> None:
    """With Inductor, which compiles the gradient of a convolution."""
    compiled.leave_convolutions_dynamic()
    conv = nn.Conv1d(4, 4, 5, padding=2, groups=2)
    with inductor.patch(force_disable_caches=True):  # the caches do not know what was changed
        call = torch.compile(lambda x: conv(x), dynamic=True, fullgraph=True)
        for samples in (5000, 7001, 6002):
            x = torch.randn(3, 4, samples, requires_grad=True)
            gradients, expected = (
                torch.autograd.grad(f(x).square().sum(), [x, *conv.parameters()]) for f in (call, conv)
            )
            torch.testing.assert_close(gradients, expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_not_compiled_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    model = model_for("spidr")
    with caplog.at_level("INFO"):
        assert compiled.compiled(model, torch.device("cpu")) is model
    assert "run.compile is ignored: on cpu" in caplog.text


def _rank(rank: int, port: int, folder: Path) -> None:
    """Compute the gradients of a step on one of two processes, compiled and not."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    cfg = read_config(write_config(folder / str(rank), folder / "none.csv"))
    cfg = replace(cfg, run=replace(cfg.run, compile=True))
    env = Environment(rank, rank, 2, torch.device("cpu"))
    kernels.is_lean = lambda _: False
    found = {}
    for compiles in (False, True):
        state.compiled = partial(_compiled, compiles=compiles)
        model = model_for("spidr", **NO_DROPOUT)
        network = state.wrap(model, cfg, env)
        for samples in (1500, 1801):
            torch.manual_seed(rank + samples)
            waveforms, options = batch(model, 2, samples, padded=False)
            network(waveforms, **options)[0].sum().backward()
        found[compiles] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found["graphs"] = counters["stats"]["unique_graphs"]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def _compiled(model: DinoSR, _: torch.device, *, compiles: bool) -> Any:
    return compiled.compile_forward(model, backend="aot_eager") if compiles else model


def test_two_processes(tmp_path: Path) -> None:
    """DistributedDataParallel around a compiled model: one graph, and the same gradients."""
    port, context = free_port(), multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in ranks:
        tmp_path.joinpath(str(ranks.index(process))).mkdir()
        process.start()
    for process in ranks:
        process.join(240)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["graphs"] == second["graphs"] == 1
    assert len(first[True]) > 10
    for name, gradient in first[False].items():
        assert torch.equal(first[True][name], second[True][name])
        torch.testing.assert_close(first[True][name], gradient, rtol=1e-4, atol=1e-5, msg=name)

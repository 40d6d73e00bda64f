"""GPU-only code on a pretended GPU: every tensor on the right device, no waiting, the CPU's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.pretend_gpu import CUDA, PretendedGpu, pretended_gpu
from helpers.small_models import tiny_model
from helpers.tiny_run import MEASURED, outcome, write_config, write_recordings
from spidr.config import Config, read_config
from spidr.data import Batch
from spidr.data.batch import Uploader
from spidr.environment import Environment, StopFlag
from spidr.extract import Options, extract_features, extract_units
from spidr.models import kernels
from spidr.state import Hooks, build_state
from spidr.tools.metrics import read_metrics
from spidr.train import train, train_step
from spidr.validate import validate_set


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    monkeypatch.setattr(kernels, "is_lean", lambda _: False)
    with pretended_gpu(monkeypatch) as found:
        yield found


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("data") / "recordings", count=12)


def configured(folder: Path, manifest: Path, device: str, **sections: Any) -> Config:
    sections = {
        "optimizer": {"max_steps": 4, "warmup_steps": 1, "hold_steps": 1, "decay_steps": 2},
        "run": {"save_interval": 2, "device": device},
        "data": {"enable_padding": True, "global_batch_length": 48_000},
        "masking": {"mask_channel_prob": 0.2, "mask_channel_length": 2},
    } | sections
    return read_config(write_config(folder, manifest, device, **sections))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("model_type", "mode"), [("spidr", "layer_norm"), ("dinosr", "group_norm")])
def test_a_step_waits_for_nothing(
    gpu: PretendedGpu, tmp_path: Path, manifest: Path, model_type: str, mode: str, dtype: str
) -> None:
    run = {"device": "cuda", "model_type": model_type}
    model = {"extractor_mode": mode, "freeze_step": 2, "codebook_revive_after": 1, "encoder_layer_drop": 0.1}
    cfg = configured(tmp_path, manifest, "cuda", model=model, run=run, optimizer={"dtype": dtype})
    state = build_state(cfg, Environment.alone("cuda"), StopFlag(), Hooks(), new=True)
    rounds = state.rounds()
    for _ in range(3):
        micro_batches = next(rounds)
        gpu.waits.clear()
        measured = train_step(state, micro_batches)
        assert measured is not None
        assert measured.loss.device == measured.grad_norm.device == CUDA
        # The float16 scaler checks for overflows.
        assert set(gpu.waits) <= ({"_local_scalar_dense"} if dtype == "float16" else set())
    state.loader.close()


def test_a_run_as_on_the_cpu(gpu: PretendedGpu, tmp_path: Path, manifest: Path) -> None:
    """Read-back, checkpoints written in the background, validation, and the end."""
    (weights, lines), (expected, expected_lines) = (
        _outcome(configured(tmp_path, manifest, device)) for device in ("cuda", "cpu")
    )
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)
    assert [line.pop("group") for line in lines] == [line.pop("group") for line in expected_lines]
    for line, expected_line in zip(lines, expected_lines, strict=True):
        assert line == pytest.approx(expected_line, rel=1e-4)
    assert gpu.log.count("main waits for side") == 4 * 2


def _outcome(cfg: Config) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights, and metrics without rates."""
    train(cfg)
    lines = read_metrics(cfg.run.dir / "metrics.jsonl")
    unequal = MEASURED | {"mfu"}
    return outcome(cfg.run.dir)[0], [{k: v for k, v in line.items() if k not in unequal} for line in lines]


@pytest.mark.parametrize(("model_type", "mode"), [("spidr", "group_norm"), ("dinosr", "layer_norm")])
def test_inference(gpu: PretendedGpu, model_type: str, mode: str) -> None:
    waveforms, lengths = torch.randn(2, 4000), [4000, 3000]
    found = []
    for device in (torch.device("cpu"), CUDA):
        model, x = tiny_model(model_type, extractor_mode=mode).eval().to(device), waveforms.to(device)
        outputs = [
            model.encode(x, lengths, layer=2)[0],
            model.encode(x, lengths, layer=2, window=0.1)[0],
            model.units(x, layer=3)[0],
            *model.get_intermediate_outputs(x, lengths=lengths),
            *model.get_codebooks(x)[1:],
        ]
        assert {output.device for output in outputs if output is not None} == {device}
        found.append([output.cpu() for output in outputs if output is not None])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="same device"):
        model.encode(waveforms, layer=2)


def test_copies_of_batches_overlap_with_computation(gpu: PretendedGpu) -> None:
    batch = Batch(torch.randn(2, 400), torch.arange(2), torch.zeros(2, dtype=torch.int64), 800, 4, 2)
    copied = Uploader(CUDA)(batch)
    assert {tensor.device for tensor in copied.tensors.values()} == {CUDA}
    assert gpu.log == ["copy on side"] * 3 + ["main waits for side"] + ["record main"] * 3
    assert Uploader(torch.device("cpu"))(batch).waveforms is batch.waveforms


def test_validation(gpu: PretendedGpu, tmp_path: Path, manifest: Path) -> None:
    cfg = configured(tmp_path, manifest, "cuda")
    found = [
        validate_set(tiny_model().to(env.device), cfg.validation["dev"], cfg.masking, env)
        for env in (Environment.alone("cpu"), Environment.alone("cuda"))
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_extraction(gpu: PretendedGpu, tmp_path: Path, manifest: Path, dtype: Any) -> None:
    tables = []
    for device in ("cpu", "cuda"):
        options = Options(device=device, dtype="float32" if device == "cpu" else dtype, progress=False)
        extract_units(manifest, tmp_path / f"{device}.jsonl", model=tiny_model(), layer=3, options=options)
        extract_features(manifest, tmp_path / device, model=tiny_model(), layer=3, options=replace(options, window=0.1))
        tables.append((tmp_path / f"{device}.jsonl").read_text())
    if dtype == "float32":
        assert tables[0] == tables[1]

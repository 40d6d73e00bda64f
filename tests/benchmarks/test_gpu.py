"""The check of a GPU runs, with tiny shapes, where only torch is installed; and a GPU's tensors are all on the GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.small_models import tiny_model

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
MISSING = ("polars", "soundfile", "submitit", "praatio", "wandb")


def run(folder: Path, *options: str) -> str:
    for name in MISSING:
        folder.joinpath(f"{name}.py").write_text("raise ImportError\n")
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    command = [sys.executable, str(SCRIPT), "--output", str(folder / "out"), *options]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    ).stdout


def test_sections(tmp_path: Path) -> None:
    out = run(tmp_path, "--sections", "0", "1", "2", "3", "4")
    results = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert {result["section"][0] for result in results} == set("01234")
    assert {result["status"] for result in results} <= {"PASS", "SKIP"}
    assert all(result["detail"] for result in results if result["status"] == "SKIP")
    assert f"{len(results)} checks, 0 failed" in out


def test_count(tmp_path: Path) -> None:
    lines = run(tmp_path, "--count", "--tiny").splitlines()
    assert lines[0].startswith("forward: ")
    assert lines[2].startswith("backward: ")
    assert int(lines[0].split()[1]) > 50


@pytest.mark.parametrize("model_type", ["spidr", "dinosr"])
@pytest.mark.parametrize("mode", ["layer_norm", "group_norm"])
def test_no_tensor_is_left_on_the_cpu(model_type: str, mode: str) -> None:
    """Fake CUDA tensors raise where they meet those of a CPU."""
    with FakeTensorMode():
        with torch.device("cuda"):
            model = tiny_model(model_type, extractor_mode=mode).train()
        model.reduction = lambda _: None
        waveforms = torch.empty(2, 4000, device="cuda")
        frames = model.feature_extractor.num_frames(4000)
        mask = torch.zeros(2, 10, dtype=torch.int64, device="cuda")
        exists = torch.ones(2, 1, 1, frames, dtype=torch.bool, device="cuda")
        loss, outputs = model(waveforms, mask=mask, attention_mask=exists)
        assert loss.device.type == "cuda"
        assert {x.device.type for x in outputs.values()} == {"cuda"}
        features = model.eval().get_intermediate_outputs(waveforms)
        assert {x.device.type for x in features} == {"cuda"}

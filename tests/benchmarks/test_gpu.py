"""The GPU check runs, with tiny shapes and only torch installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spidr.environment import Environment

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
MISSING = ("polars", "soundfile", "submitit", "praatio", "wandb")


def test_every_section(tmp_path: Path) -> None:
    for name in MISSING:
        tmp_path.joinpath(f"{name}.py").write_text("raise ImportError\n")
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "out"), "--tiny"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert {result["section"][0] for result in results} == set("01234567")
    assert {result["status"] for result in results} == {"PASS", "SKIP"}
    assert all(result["detail"] for result in results if result["status"] == "SKIP")
    assert f"{len(results)} checks, 0 failed" in done.stdout
    assert next(tmp_path.glob("out/trace.json*")).stat().st_size > 0


def test_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the script sets it
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", script)
    spec.loader.exec_module(script)
    lines = script.count(script.Bench(Environment.alone("cpu"), True, tmp_path)).splitlines()
    kernels = {line.split(": ")[0]: int(line.split()[-4].replace(",", "")) for line in lines if ": " in line}
    assert list(kernels) == ["forward", "backward", "clipping and AdamW", "teacher and codebooks", "step"]
    assert sum(kernels.values()) == 2 * kernels["step"] > 400

"""The check of a GPU runs, with tiny shapes, where only torch is installed; and a GPU's tensors are all on the GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

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

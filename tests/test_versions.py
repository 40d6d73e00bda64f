"""The package built, installed alone and tested with every supported Python and with the oldest and newest torch.

Each case makes an environment of several GB: ``pytest -m versions``.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.versions, pytest.mark.timeout(3600)]

CASES = [("3.11", "torch==2.8.*"), ("3.12", "torch"), ("3.13", "torch")]

INFERENCE = """
import torch
from spidr.config import SpidRConfig
from spidr.models import SpidR
model = SpidR(SpidRConfig(encoder_num_layers=2, num_codebooks=1)).eval()
units, frames = model.units(torch.randn(2, 32_000), torch.tensor([32_000, 20_000]), layer=2)
assert units.shape == (2, 99) and frames.tolist() == [99, 62]
"""


def interpreter(version: str) -> str:
    """A Python of this version: pyenv's, else the one on the path."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [str(path) for path in sorted(root.glob(f"versions/{version}.*/bin/python"))]
    found += [path for path in [shutil.which(f"python{version}")] if path is not None]
    if not found:
        pytest.skip(f"Python {version} is not installed")
    return found[0]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.mark.parametrize(("version", "torch"), CASES)
def test_installed_alone_and_tested(version: str, torch: str, tmp_path: Path) -> None:
    run(interpreter(version), "-m", "venv", "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", "dist", ROOT, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("spidr-*.whl")
    run(python, "-m", "pip", "install", torch, wheel, cwd=tmp_path)
    installed = run(python, "-m", "pip", "list", cwd=tmp_path)
    assert not any(name in installed for name in ("polars", "soundfile", "submitit", "tqdm", "wandb"))
    run(python, "-W", "error", "-c", INFERENCE, cwd=tmp_path)
    run(python, "-m", "pip", "install", torch, f"{wheel}[test]", cwd=tmp_path)
    tests = [ROOT / "tests" / name for name in ("models", "data", "tools", "test_config.py", "test_train.py")]
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=tmp_path)

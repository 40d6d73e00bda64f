"""Build the package, install it alone, and test it with every supported Python and the oldest and newest torch.

``pytest -m versions``: each case makes an environment of several GB.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.versions, pytest.mark.timeout(3600)]

CASES = [("3.11", "torch==2.8.*"), ("3.12", "torch"), ("3.13", "torch"), ("3.14", "torch")]

WEIGHTS = """
import torch
from pathlib import Path
from spidr.models import SpidR
folder = Path(torch.hub.get_dir(), "checkpoints")
folder.mkdir(parents=True)
torch.save({"model": SpidR().state_dict()}, folder / "spidr_base.pt")  # as if downloaded before
"""
PYTHON = r"^```python\n(.*?)^```$"
WITH_TENSORS, WITH_RECORDING = (
    next(
        block
        for block in re.findall(PYTHON, page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        if "spidr_base" in block
    )
    for page in (ROOT / "docs" / "index.md", ROOT / "README.md")
)
CHECK = "assert features.shape == (2, 99, 768) and units.shape == (2, 99)"


def interpreter(version: str) -> str:
    """A Python of this version: pyenv's, otherwise the one on the path."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [str(path) for path in sorted(root.glob(f"versions/{version}.*/bin/python"))]
    found += [path for path in [shutil.which(f"python{version}")] if path is not None]
    if not found:
        pytest.skip(f"Python {version} is not installed")
    return found[0]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTEST_ADDOPTS", "PYTHONPATH")}
    if cwd != ROOT:
        environment["TORCH_HOME"] = str(cwd / "hub")
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.mark.parametrize(("version", "torch"), CASES)
def test_installed_alone_and_tested(version: str, torch: str, tmp_path: Path) -> None:
    for name in ("build-venv", "venv"):
        run(interpreter(version), "-m", "venv", name, cwd=tmp_path)
    build, python = (tmp_path / name / "bin" / "python" for name in ("build-venv", "venv"))
    run(build, "-m", "pip", "install", "build", cwd=tmp_path)
    run(build, "-m", "build", "--outdir", "dist", ROOT, cwd=tmp_path)  # the wheel is built from the sdist
    (wheel,), (sdist,) = ((tmp_path / "dist").glob(pattern) for pattern in ("spidr-*.whl", "spidr-*.tar.gz"))
    for archive in (sdist, wheel):
        run(python, "-m", "pip", "install", "--force-reinstall", "--no-deps", archive, cwd=tmp_path)
        run(python, "-m", "pip", "install", torch, archive, cwd=tmp_path)
        installed = run(python, "-m", "pip", "list", cwd=tmp_path)
        assert not any(name in installed for name in ("polars", "soundfile", "submitit", "tqdm", "wandb"))
        if not (tmp_path / "hub").exists():
            run(python, "-W", "error", "-c", WEIGHTS, cwd=tmp_path)
        run(python, "-W", "error", "-c", f"{WITH_TENSORS}\n{CHECK}", cwd=tmp_path)
    run(python, "-m", "pip", "install", torch, f"{wheel}[test]", cwd=tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    units = json.loads(run(python, "-W", "error", "-c", WITH_RECORDING, cwd=tmp_path))
    assert units
    assert set(units) <= set(range(256))
    tests = [ROOT / "tests" / name for name in ("models", "data", "tools", "test_config.py", "test_train.py")]
    # Run here, or processes started by tests would not find the tests' modules.
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=ROOT)

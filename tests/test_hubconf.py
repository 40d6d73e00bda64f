"""The repository is a torch.hub repository without being installed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CODE = """
import importlib.util, sys, torch
root, name = sys.argv[1:]
sys.path = [path for path in sys.path if path != f"{root}/src"]  # an editable installation
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
before = list(sys.path)
assert importlib.util.find_spec("spidr") is None
model = torch.hub.load(root, name, source="local", pretrained=False)
assert sys.modules["spidr"].__file__ == f"{root}/src/spidr/__init__.py"
assert sys.path == before
print(type(model).__name__, model.training, model.cfg.encoder_qkv_bias)
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("spidr_base", "SpidR False False"),
        ("dinosr_base_reproduced", "DinoSR False False"),
        ("dinosr_base_original", "DinoSR False True"),
        ("dinor_base_reproduced", "DinoSR False False"),
        ("spidr_vp20", "SpidR False False"),
    ],
)
def test_load(tmp_path: Path, name: str, expected: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(ROOT), name], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (run.stdout.strip(), run.returncode) == (expected, 0), run.stderr
    assert list(tmp_path.iterdir()) == []

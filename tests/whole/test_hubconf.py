"""The repository works with torch.hub without being installed."""

import runpy
import subprocess
import sys
from pathlib import Path

from spidr.models.published import PUBLISHED

ROOT = Path(__file__).parents[2]

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


def test_load(tmp_path: Path) -> None:
    """By the table's name, and by the published page's spelling."""
    for name, expected in (
        ("dinosr_base_original", "DinoSR False True"),
        ("dinor_base_reproduced", "DinoSR False False"),
    ):
        run = subprocess.run(
            [sys.executable, "-c", CODE, str(ROOT), name], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (run.stdout.strip(), run.returncode) == (expected, 0), run.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_published_model_is_an_entry_point() -> None:
    path = ROOT / "hubconf.py"
    entry_points = runpy.run_path(str(path))["__all__"]
    assert set(entry_points) == {*PUBLISHED, "dinor_base_reproduced"}

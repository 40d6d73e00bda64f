"""What the package is as a whole: what it imports, prints and touches, and how its modules depend on each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "spidr"
OPTIONAL = (
    "fastabx",
    "matplotlib",
    "praatio",
    "onnxscript",
    "polars",
    "safetensors",
    "soundfile",
    "submitit",
    "torchcodec",
    "tqdm",
)
OPTIONAL += ("transformers", "viztracer", "wandb")

IMPORT_MODELS = f"""
import logging, os, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import torch
loggers, threads = set(logging.root.manager.loggerDict), torch.get_num_threads()
import spidr.models
new = set(logging.root.manager.loggerDict) - loggers
assert all(not getattr(logging.getLogger(name), "handlers", []) for name in new)
assert logging.root.handlers == [] and torch.get_num_threads() == threads
model = spidr.models.SpidR(spidr.models.SpidR.config_class(encoder_num_layers=1, num_codebooks=1)).eval()
assert model.encode(torch.randn(1, 16000), layer=1)[0].shape == (1, 49, 768)
assert os.listdir() == []
"""


def test_models_need_torch_and_numpy_only_and_touch_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", IMPORT_MODELS]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "module",
    [
        "spidr",
        "spidr.train",
        "spidr.extract",
        "spidr.evaluate",
        "spidr.export",
        "spidr.report",
        "spidr.warm_start",
        "spidr.data.write_manifest",
        "spidr.tools.metrics_queue",
    ],
)
def test_help(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", module, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: python -m {module} ")
    assert not list(tmp_path.iterdir())


MAY_IMPORT = {
    "config": set(),
    "lazy": set(),
    "models": {"config", "lazy"},
    "data": {"config", "lazy"},
    "tools": {"config"},
    "environment": {"config", "tools"},
    "optimizer": {"config"},
    "checkpoint": {"config", "models", "tools"},
    "compiled": {"config", "models"},
    "abx": {"config", "data"},
    "evaluate": {"config", "models", "data", "environment", "validate", "abx"},
    "report": {"config", "models", "data", "environment", "validate", "tools"},
    "validate": {"config", "models", "data", "environment", "tools"},
    "extract": {"config", "models", "data", "environment", "tools"},
    "slurm": {"config", "environment", "tools", "train", "validate"},
    "run": {"config", "models", "data", "environment", "optimizer", "checkpoint", "validate", "slurm", "tools"},
    "train": {
        *("config", "models", "data", "environment", "optimizer", "checkpoint", "compiled", "validate", "run", "tools")
    },
    "warm_start": {"config", "models", "data", "environment", "optimizer", "tools"},
    "export": {"config", "models", "tools"},
    "metrics_queue": {"config", "slurm", "tools"},  # a command line of its own
    "__main__": {"config", "data", "environment", "slurm", "train", "tools"},
}
"""Arrows point one way. ``run`` starts validation jobs; what the jobs call is imported inside them."""


PLACES = {
    "cycler": {"report"},
    "fastabx": {"abx"},
    "matplotlib": {"report"},
    "onnxscript": {"export"},
    "polars": {"abx", "data", "extract"},  # tables are polars tables
    "praatio": {"data"},
    "safetensors": {"models"},
    "sklearn": {"extract"},
    "soundfile": {"data"},
    "submitit": {"slurm"},
    "torchcodec": {"data"},
    "transformers": {"export"},
    "viztracer": {"tools"},
    "wandb": {"tools"},
}
"""Which part of the package imports what is not torch, numpy or a progress bar: in one of its modules."""


def imported(path: Path) -> set[str]:
    """Names of the modules that a module imports, at its top or in a function, but not for type checking only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def part_of(path: Path) -> str:
    part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return path.stem if path.stem == "metrics_queue" else part


modules = pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))


@modules
def test_import_directions(path: Path) -> None:
    part = part_of(path)
    parts = {name.split(".")[1] for name in imported(path) if name.startswith("spidr.")}
    assert parts - {part} <= MAY_IMPORT.get(part, set())


@modules
def test_dependencies_have_their_place(path: Path) -> None:
    others = {name.partition(".")[0] for name in imported(path)} - sys.stdlib_module_names
    for name in others - {"spidr", "torch", "numpy", "tqdm"}:
        assert part_of(path) in PLACES[name], f"{name} is imported in {sorted(PLACES[name])}"


@modules
def test_docstring_says_what_the_module_may_import(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert "import" in docstring.lower()

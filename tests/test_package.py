"""The package as a whole: what it imports, prints and touches, and how its modules depend on each other."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.forks import Forks
from helpers.tiny_run import write_config, write_recordings
from spidr.config import read_config, to_dict
from spidr.models import build_model
from spidr.tools.errors import InputError
from spidr.tools.lazy import command_needs, needs_extra

SOURCE = Path(__file__).parents[1] / "src" / "spidr"
EXTRAS = {
    "train": {"polars", "praatio", "soundfile", "soxr", "submitit", "torchcodec", "tqdm", "viztracer", "wandb"},
    "extract": {"polars", "sklearn", "soundfile", "soxr", "torchcodec", "tqdm"},
    "plot": {"cycler", "matplotlib"},
    "abx": {"tools", "fastabx"},
    "export": {"onnx", "onnxruntime", "onnxscript", "safetensors", "transformers"},
}
OPTIONAL = set().union(*EXTRAS.values())

REFUSE = """
import sys

class Refuse:
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
"""

IMPORT_MODELS = f"""{REFUSE}
import logging, os

sys.meta_path.insert(0, Refuse({OPTIONAL!r}))
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


def without(missing: set[str], module: str, *arguments: str) -> str:
    """Code equivalent to ``python -m module`` with some packages missing."""
    return f"""{REFUSE}
import runpy
sys.meta_path.insert(0, Refuse({sorted(missing)!r}))
for name in [name for name in sys.modules if name.partition(".")[0] in {sorted(missing)!r}]:
    del sys.modules[name]
sys.argv[1:] = {list(arguments)!r}
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "module",
    [
        "spidr",
        "spidr.train",
        "spidr.extract",
        "spidr.evaluate",
        "spidr.export",
        "spidr.models",
        "spidr.report",
        "spidr.warm_start",
        "spidr.data.write_manifest",
        "spidr.tools.metrics_queue",
    ],
)
def test_help_needs_no_extra_and_does_not_wait_for_torch(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", without(OPTIONAL | {"torch"}, module, "--help")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    named = module.removesuffix(".train")  # which runs the package's own program
    assert result.stdout.startswith(f"usage: python -m {named} ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        "-m spidr",
        *(f"-m spidr.extract {name}" for name in ("units", "features", "kmeans")),
        *(f"-m spidr.evaluate {name}" for name in ("units", "abx", "model")),
        *(f"-m spidr.export {name}" for name in ("safetensors", "onnx", "transformers")),
        "-m spidr.report",
        "-m spidr.data.write_manifest",
        "-m spidr.tools.metrics_queue",
        *(f"paper/{name}.py" for name in ("extract_features", "figures", "reproduce", "tables")),
    ],
)
def test_help_states_every_default(command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command.split(), "--help"],
        capture_output=True,
        text=True,
        cwd=SOURCE.parents[1],
        env=os.environ | {"COLUMNS": "500"},
        check=True,
    )
    options = re.findall(r"^  (-\S+(?: \S+)*)(?:(?:  +|\n {10,})(.+))?$", done.stdout, re.MULTILINE)
    takes_value = {name: text for name, text in options if re.search(r"--[\w-]+ \S", name)}
    assert [name for name, text in takes_value.items() if "default" not in text] == []
    assert ("-h, --help", "show this help message and exit") in options
    if any("{auto,cuda,mps,cpu}" in name for name in takes_value):
        assert "(default: auto: CUDA, else MPS, else the CPU)" in done.stdout


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with input for every command."""
    folder = tmp_path_factory.mktemp("inputs")
    manifest = write_recordings(folder / "recordings", count=2)
    cfg = read_config(write_config(folder, manifest))
    write_config(folder, manifest, "profiled", run={"profile": True})
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(json.dumps(to_dict(cfg)))
    line = {"step": 1, "group": "train", "loss": 1.0}
    (folder / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    torch.save({"model": build_model(cfg=cfg.model).state_dict()}, folder / "run" / "step_1.pt")
    (folder / "units.jsonl").write_text('{"fileid": "a", "units": [1]}\n')
    (folder / "phones.jsonl").write_text('{"fileid": "a", "phones": ["A", "A"]}\n')
    (folder / "phones.TextGrid").write_text("no grid")
    (folder / "a.item").write_text("#file onset offset #phone prev-phone next-phone speaker\na 0 1 A B C s\n")
    (folder / "units.parquet").write_bytes(b"no table")
    return folder


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


SUBMIT = ("run.json", "-A", "a", "-N", "1", "-G", "1", "--dump", "dump")


@pytest.mark.parametrize(
    ("missing", "extra", "command"),
    [
        ("polars", "train", ("spidr", "run.json")),
        ("soundfile", "train", ("spidr", "run.json")),
        ("polars", "train", ("spidr", "run.json", "--dry-run")),
        ("submitit", "train", ("spidr", *SUBMIT)),
        ("polars", "train", ("spidr", *SUBMIT)),
        ("soundfile", "train", ("spidr.train", "run.json")),
        ("tqdm", "train", ("spidr.train", "run.json")),
        ("tqdm", "train", ("spidr.warm_start", "run.json", "warm.pt")),
        ("soundfile", "train", ("spidr.warm_start", "run.json", "warm/warm.pt")),
        ("viztracer", "train", ("spidr.train", "profiled.json")),  # at once, not after a thousand steps
        ("polars", "train", ("spidr.data.write_manifest", "recordings", "m.csv")),
        ("soundfile", "train", ("spidr.data.write_manifest", "recordings", "m.csv")),
        ("soundfile", "extract", ("spidr.extract", "features", "recordings", "out")),
        ("polars", "extract", ("spidr.extract", "units", "recordings", "out.jsonl")),
        ("sklearn", "extract", ("spidr.extract", "kmeans", "recordings", "out.npz")),
        ("polars", "train", ("spidr.evaluate", "units", "units.parquet", "phones.jsonl")),
        ("praatio", "train", ("spidr.evaluate", "units", "units.jsonl", "phones.TextGrid")),
        ("fastabx", "abx", ("spidr.evaluate", "abx", "units.jsonl", "a.item")),
        ("soundfile", "train", ("spidr.evaluate", "model", "run/step_1.pt", "recordings.csv", "phones.jsonl")),
        ("matplotlib", "train,plot", ("spidr.report", "run")),
        ("polars", "train,plot", ("spidr.report", "run")),
        ("safetensors", "export", ("spidr.export", "safetensors", "run/step_1.pt", "out.safetensors")),
        ("safetensors", "export", ("spidr.export", "transformers", "run/step_1.pt", "out")),
        ("onnxscript", "export", ("spidr.export", "onnx", "run/step_1.pt", "out.onnx")),
        ("wandb", "train", ("spidr.tools.metrics_queue", "run", "--entity", "e")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_commands_name_the_missing_extra(
    missing: str, extra: str, command: tuple[str, ...], inputs: Path, forks: Forks
) -> None:
    before = sorted(inputs.rglob("*"))
    result = forks.run(without({missing}, *command), inputs)
    note = " (Python 3.12 or newer)" if extra == "abx" else ""
    *before_it, error = result.stderr.splitlines()
    assert error == f"error: `{missing}` is missing: install it with `pip install 'spidr[{extra}]'`{note}"
    assert all(" INFO training " in line for line in before_it)
    assert (result.returncode, result.stdout) == (2, "")
    assert sorted(inputs.rglob("*")) == before


def test_missing_packages_and_missing_modules_of_ours() -> None:
    message = r"^`cycler` is missing: install it with `pip install 'spidr\[train,plot\]'`$"
    with pytest.raises(InputError, match=message), needs_extra("train,plot"):
        raise ModuleNotFoundError("No module named 'cycler.a'", name="cycler.a")
    for context in (needs_extra("train"), command_needs("train", "__main__"), command_needs("train", "spidr.train")):
        with pytest.raises(ModuleNotFoundError), context:
            import spidr.nothing  # type: ignore[import-not-found]  # noqa: F401
    with pytest.raises(ModuleNotFoundError), command_needs("train", "spidr.train"):
        raise ModuleNotFoundError("No module named 'polars'", name="polars")


PLACES = {
    "cloudpickle": {"slurm"},
    "cycler": {"report"},
    "discophon": {"evaluate"},
    "fastabx": {"evaluate"},
    "huggingface_hub": {"tools"},
    "matplotlib": {"report"},
    "onnxscript": {"export"},
    "polars": {"data", "evaluate", "extract"},  # tables are polars'
    "praatio": {"data"},
    "safetensors": {"models"},
    "sklearn": {"extract"},
    "soundfile": {"data"},
    "soxr": {"data"},
    "submitit": {"slurm"},
    "torchcodec": {"data"},
    "transformers": {"export"},
    "viztracer": {"tools"},
    "wandb": {"compat", "tools"},
}
"""Parts of the package that may import each package other than torch, numpy and tqdm."""


def imported(path: Path) -> set[str]:
    """Modules that a module imports, at its top or in a function, but not only for type checking."""
    tree = ast.parse(path.read_text("utf-8"))
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
def test_dependencies_have_their_place(path: Path) -> None:
    others = {name.partition(".")[0] for name in imported(path)} - sys.stdlib_module_names
    for name in others - {"spidr", "torch", "numpy", "tqdm"}:
        assert part_of(path) in PLACES[name], f"{name} is imported in {sorted(PLACES[name])}"

"""Every code block of the README and the guides runs as printed, on its own."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from helpers.small_models import TINY
from spidr.config import DEFAULT_CONV_LAYER_CONFIG, read_config
from spidr.models import SpidR

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page.stem, language, text)
    for page in PAGES
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
]
RUN_BY_CI = {
    'python3 -m venv .venv && .venv/bin/pip install -e ".[train,plot]" && .venv/bin/python examples/quickstart/run.py',
    'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/python -m pytest',
}
"""The two commands for a fresh clone, which ``.ci/run`` takes from the README."""

AT_50_HZ = TINY | {
    "extractor_conv_layer_config": [(16, kernel, stride) for _, kernel, stride in DEFAULT_CONV_LAYER_CONFIG]
}

CONFIG = """
[run]
workdir = "runs"
wandb_project = "my-project"
wandb_name = "my-run"
wandb_mode = "disabled"
model_type = "spidr"
[data]
manifest = "train.csv"
num_workers = 0
max_sample_size = 16000
max_batch_length = 32000
[optimizer]
max_steps = 2
dtype = "float32"
[model]
"""


def blocks(language: str) -> list[tuple[str, str]]:
    return [(page, text) for page, found, text in BLOCKS if found == language]


def test_every_block_is_tested_or_not_meant_to_run() -> None:
    assert {language for _, language, _ in BLOCKS} <= {"sh", "python", "toml", "json", "bibtex", "console"}
    assert {line for _, text in blocks("sh") for line in text.splitlines()} >= RUN_BY_CI
    assert (ROOT / ".ci" / "run").read_text().count("readme_command") >= 2


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text("utf-8")):
            is_generated = target.startswith("reference/")
            assert is_generated or "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_guides_that_errors_name_exist() -> None:
    source = "".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    named = set(re.findall(r'(?:guide=|GUIDE = )"([^"]+)"', source))
    assert len(named) >= 8
    for guide in named:
        page, _, section = guide.partition("#")
        headings = re.findall(r"^#+ (.+)$", (ROOT / "docs" / page).read_text("utf-8"), flags=re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not section or section in anchors, guide


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what the pages expect: recordings, a configuration, a trained model."""
    folder = tmp_path_factory.mktemp("docs")
    rng = np.random.default_rng(0)
    for place in ("recordings", "dev-recordings"):
        (folder / place).mkdir()
        for i in range(4):
            soundfile.write(folder / place / f"{i}.wav", 0.1 * rng.standard_normal(16_000 + 500 * i), 16_000)
    model = "\n".join(f"{key} = {json.dumps(value)}" for key, value in AT_50_HZ.items())
    (folder / "config.toml").write_text(CONFIG + model)
    for name in ("hubconf.py", "src", "configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    run = folder / "runs" / "my-project" / "my-run"
    run.mkdir(parents=True)
    cache = folder / "hub" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save({"model": SpidR().state_dict()}, cache / "spidr_base.pt")  # as if already downloaded
    (cache / "spidr_vp20.pt").hardlink_to(cache / "spidr_base.pt")
    (folder / "dev-features").mkdir()
    for i in range(2):
        np.save(folder / "dev-features" / f"{i}.npy", rng.standard_normal((49, 4)))
    _write_phones(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def environment(workplace: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"TORCH_HOME": str(workplace / "hub"), "PATH": path}


def _write_phones(folder: Path) -> None:
    """Write alignments, units and items of recordings 0 and 1, which last slightly over 1 s."""
    phones = [[name, i / 10, (i + 1) / 10] for i, name in enumerate("ABABABABAB")]
    lines = {
        "dev-alignments.jsonl": {"phones": phones, "duration": 1.0},
        "dev-units.jsonl": {"units": [1] * 20 + [2] * 29},
    }
    for name, values in lines.items():
        (folder / name).write_text("".join(json.dumps({"fileid": str(i)} | values) + "\n" for i in range(2)))
    items = [f"{i} {start} {end} {name} x y s{i}\n" for i in range(2) for name, start, end in phones]
    (folder / "phoneme.item").write_text("#file onset offset #phone prev-phone next-phone speaker\n" + "".join(items))
    rows = [f"{i},{folder}/recordings/{i}.wav,{16_000 + 500 * i}\n" for i in range(2)]
    (folder / "dev.csv").write_text("fileid,path,num_samples\n" + "".join(rows))
    (folder / "train.csv").write_text("fileid,path,num_samples\n" + "".join(rows))


@pytest.mark.timeout(900)  # some examples run the base model
@pytest.mark.parametrize("page", sorted({page for page, _ in blocks("sh")}))
def test_shell_blocks(page: str, workplace: Path, environment: dict[str, str]) -> None:
    _have_a_trained_model(workplace)
    commands = [line for found, text in blocks("sh") if found == page for line in text.splitlines()]
    for command in commands:
        if command in RUN_BY_CI or ("spidr.evaluate abx" in command and sys.version_info < (3, 12)):
            continue  # fastabx needs Python 3.12
        result = subprocess.run(
            command, shell=True, capture_output=True, text=True, check=False, cwd=workplace, env=environment
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def _have_a_trained_model(workplace: Path) -> None:
    """Train the pages' model, unless a page tested before has done so."""
    run = workplace / "runs" / "my-project" / "my-run"
    if not (run / "final.pt").exists():
        subprocess.run([sys.executable, "-m", "spidr", "config.toml"], cwd=workplace, check=True, capture_output=True)
    assert (run / "final.pt").exists()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("page", "block"), blocks("python"), ids=lambda value: value.splitlines()[0][:40])
def test_python_blocks(page: str, block: str, workplace: Path, environment: dict[str, str]) -> None:
    _have_a_trained_model(workplace)
    subprocess.run([sys.executable, "-c", block], cwd=workplace, env=environment, check=True)


@pytest.mark.parametrize(("page", "block"), blocks("toml"))
def test_toml_blocks(page: str, block: str, tmp_path: Path) -> None:
    if block.startswith(("[run]", "[validation")):
        smallest = next(text for _, text in blocks("toml") if text.startswith("[run]"))
        (tmp_path / "config.toml").write_text(block if block.startswith("[run]") else smallest + block)
        assert read_config(tmp_path / "config.toml").run.model_type == "spidr"

"""Every code block of the README runs as it stands."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from small_models import TINY
from spidr.config import DEFAULT_CONV_LAYER_CONFIG, read_config, to_dict
from spidr.models import SpidR, build_model

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
NOT_RUN_HERE = {
    'python3 -m venv .venv && .venv/bin/pip install -e ".[train]" && .venv/bin/python examples/quickstart/run.py',
    'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/python -m pytest',
    "python docs/build.py",
}
"""What ``.ci/run`` runs: the two commands for a fresh clone, which it takes from the README, and the reference."""

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
compile = false
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


def blocks(*languages: str) -> list[str]:
    return [text for language, text in BLOCKS if language in languages]


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "python", "toml", "bibtex"}
    commands = {line for block in blocks("sh") for line in block.splitlines()}
    assert commands >= NOT_RUN_HERE
    ci = (ROOT / ".ci" / "run").read_text()
    assert ci.count("readme_command") >= 2  # it takes them from the README


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what the README supposes to be there: recordings, a configuration, a trained model."""
    rng = np.random.default_rng(0)
    for i in range(4):
        for kind in ("wav", "flac"):
            path = tmp_path / "recordings" / f"{i}.{kind}"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, 0.1 * rng.standard_normal(16_000 + 500 * i), 16_000)
    subprocess.run(["tar", "-cf", "recordings.tar", "recordings"], cwd=tmp_path, check=True)
    model = "\n".join(f"{key} = {json.dumps(value)}" for key, value in AT_50_HZ.items())
    (tmp_path / "config.toml").write_text(CONFIG + model)
    for name in ("hubconf.py", "src", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    cache = tmp_path / "hub" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save({"model": SpidR().state_dict()}, cache / "spidr_base.pt")  # as if downloaded before
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for i in range(2):
        np.save(_made(tmp_path / "dev-features") / f"{i}.npy", rng.standard_normal((49, 4)))
    _write_phones(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    yield tmp_path
    shutil.rmtree(tmp_path / "hub", ignore_errors=True)


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _write_phones(folder: Path) -> None:
    """Alignments, units and items of the recordings 0 and 1, which last 1 s and a little more."""
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


@pytest.mark.timeout(900)  # the examples run the base model
def test_shell_blocks(workplace: Path) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines() if line not in NOT_RUN_HERE]
    assert len(commands) >= 5
    for command in commands:
        if "spidr.evaluate abx" in command and sys.version_info < (3, 12):
            continue  # fastabx needs it
        result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    assert (workplace / "runs" / "my-project" / "my-run" / "final.pt").exists()
    assert len((workplace / "units.jsonl").read_text().splitlines()) == 8
    assert len(list((workplace / "features").glob("*.npy"))) == 8


def test_python_blocks(workplace: Path) -> None:
    run = workplace / "runs" / "quickstart" / "spidr"
    run.mkdir(parents=True)
    (workplace / "train.csv").write_text("fileid,path,num_samples\n")
    cfg = read_config(workplace / "config.toml")
    (run / "config.json").write_text(json.dumps(to_dict(cfg)))
    torch.save({"model": build_model(cfg=cfg.model).state_dict()}, run / "final.pt")
    namespace: dict[str, Any] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
        if "features" in block:
            assert namespace["features"].shape == (2, 99, 768)
            assert namespace["units"].shape == (2, 99)
            assert namespace["frames"].tolist() == [99, 62]
        if "codebooks" in block:
            assert namespace["codebooks"][3] is None
            assert namespace["codebooks"][4].shape == (1, 99, 256)
    assert torch.isfinite(namespace["loss"]).all()


def test_toml_blocks(tmp_path: Path) -> None:
    whole, addition = blocks("toml")
    (tmp_path / "config.toml").write_text(whole + addition)
    assert set(read_config(tmp_path / "config.toml").validation) == {"dev"}

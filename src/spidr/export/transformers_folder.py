"""Export an encoder as a folder for ``transformers``.

``AutoModel.from_pretrained(folder, trust_remote_code=True)`` needs neither spidr nor a network: the folder holds copies
of the modules that compute the model, with relative imports.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import spidr
from spidr.export.safetensors_file import export_safetensors
from spidr.models import DinoSR
from spidr.models.weights import type_of
from spidr.tools.errors import InputError
from spidr.tools.files import expand, write_json, writing

SOURCE = Path(spidr.__file__).parent
ENTRY_POINTS = ("spidr.export.configuration_spidr", "spidr.export.modeling_spidr")
IMPORT = re.compile(r"^from (spidr(?:\.\w+)+) import", re.MULTILINE)

MODEL_CARD = """\
---
library_name: transformers
tags: [speech, spidr]
---
# {name} encoder

Written by spidr {version}. Load it with

    from transformers import AutoModel
    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    features, frames = model.encode(waveforms, lengths, layer={layer})  # 16 kHz, (B, S); layers from 1
    units, frames = model.units(waveforms, lengths, layer={layer})

The code is licensed CC BY-NC 4.0.
"""


def export_transformers(model: DinoSR, output: str | Path) -> None:
    """Write ``config.json``, ``model.safetensors``, ``preprocessor_config.json``, a model card and the code.

    ``model.safetensors`` is what :func:`~spidr.export.export_safetensors` writes.

    Args:
        model: The model; it is not changed.
        output: The folder, which must not exist.

    Raises:
        InputError: The folder exists or cannot be written, or safetensors is not installed.
    """
    config = {
        "architectures": ["SpidREncoder"],
        "auto_map": {
            "AutoConfig": "configuration_spidr.SpidREncoderConfig",
            "AutoModel": "modeling_spidr.SpidREncoder",
        },
        "model_type": "spidr",
        "settings": asdict(model.cfg),
        "spidr_type": type_of(model.cfg),
        "spidr_version": spidr.__version__,
        "hidden_size": model.cfg.encoder_embed_dim,
        "num_hidden_layers": model.cfg.encoder_num_layers,
        "num_attention_heads": model.cfg.encoder_num_heads,
    }
    preprocessor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": False,  # the model does it
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": 16000,
    }
    with _new_folder(expand(output)) as folder:
        write_json(folder / "config.json", config, indent=2)
        write_json(folder / "preprocessor_config.json", preprocessor, indent=2)
        for name, text in code().items():
            (folder / name).write_text(text, encoding="utf-8")
        card = MODEL_CARD.format(name=type(model).__name__, version=spidr.__version__, layer=model.best_layer)
        (folder / "README.md").write_text(card, encoding="utf-8")
        export_safetensors(model, folder / "model.safetensors")


def code() -> dict[str, str]:
    """Collect the modules that the entry points need: file name → text, with imports from the same folder."""
    files: dict[str, str] = {}
    waiting = list(ENTRY_POINTS)
    while waiting:
        module = waiting.pop()
        name = module.rpartition(".")[2]
        if f"{name}.py" in files:
            continue
        text = SOURCE.parent.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        waiting += IMPORT.findall(text)
        files[f"{name}.py"] = IMPORT.sub(lambda match: f"from .{match[1].rpartition('.')[2]} import", text)
    return files


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under ``path`` complete, or not at all."""
    with writing(path):
        if path.exists():
            raise InputError(f"{path}: exists; choose another output")
        with tempfile.TemporaryDirectory(prefix=".spidr-", dir=path.parent) as aside:
            folder = Path(aside) / path.name
            folder.mkdir()
            yield folder
            folder.rename(path)

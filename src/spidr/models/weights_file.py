"""The safetensors format: weights without code, with the model's configuration in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

from torch import Tensor

from spidr.config import DinoSRConfig, SpidRConfig, model_config
from spidr.tools.errors import InputError, first_line
from spidr.tools.lazy import needs_extra

SUFFIX = ".safetensors"


def to_bytes(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a file of these weights. ``metadata`` are strings, for :func:`read_config` those it names."""
    _library()
    from safetensors.torch import save

    return save({name: value.contiguous() for name, value in weights.items()}, {"format": "pt", **metadata})


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Name → tensor on the CPU.

    Raises:
        Exception: Any, as from the library, if the file is damaged.
    """
    with _library().safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def read_config(path: str | Path) -> DinoSRConfig | None:
    """The configuration that the header holds: ``model_type`` and, as JSON, the table ``model``. None without them.

    Raises:
        InputError: The file cannot be read, or the configuration is wrong.
    """
    try:
        with _library().safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if not {"model_type", "model"} <= metadata.keys():
            return None
        table = json.loads(metadata["model"])
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot read the file: {error.strerror or error}") from None
    except Exception as error:
        raise InputError(f"{path}: damaged or no safetensors file ({first_line(error)})") from None
    if not isinstance(table, dict):
        raise InputError(f"{path}: the header's 'model' is no table")
    return model_config(metadata["model_type"], table, source=str(path))


def config_metadata(cfg: DinoSRConfig) -> dict[str, str]:
    """What :func:`read_config` reads back."""
    return {"model_type": "spidr" if isinstance(cfg, SpidRConfig) else "dinosr", "model": json.dumps(asdict(cfg))}


def _library() -> ModuleType:
    with needs_extra("export"):
        import safetensors
    return safetensors

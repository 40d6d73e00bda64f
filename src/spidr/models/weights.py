"""Load checkpoints and safetensors files, whoever wrote them, into a model: all of it or nothing.

No code from a file is ever run (see :mod:`spidr.tools.tensors`).
"""

import hashlib
import json
import logging
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spidr.config import DinoSRConfig, SpidRConfig, model_config
from spidr.tools.errors import InputError, first_line, some
from spidr.tools.files import check_file
from spidr.tools.lazy import needs_extra
from spidr.tools.tensors import Inert, check_plain, read_tensors
from spidr.tools.untrusted import read_table

logger = logging.getLogger(__name__)

T = TypeVar("T")

SAFETENSORS = ".safetensors"
HOLDERS = ("model", "state_dict", "model_state_dict")
"""Keys under which others' files hold their weights, if not at the top."""
WRAPPERS = {"module", "_orig_mod", "model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that DistributedDataParallel, torch.compile, Lightning, transformers and others add."""
ANCHOR = "mask_embedding"
"""The weight that every model has at its top."""
LARGEST = 1e10
"""Larger weights come from a run that has diverged."""


# --------------------------------------------------------------------------------------------------------------------
# Reading


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the weights in a file, whatever else it holds.

    Args:
        path: A ``torch.save`` file with the weights at its top or under "model" or "state_dict", or ``.safetensors``.
            Prefixes that DistributedDataParallel, ``torch.compile``, Lightning and the like add to names are removed.

    Returns:
        Name → tensor on the CPU, as saved and in the order of the file.

    Raises:
        InputError: The file is missing, truncated or no checkpoint, or its checksum is wrong.
    """
    if Path(path).suffix == SAFETENSORS:
        return guarded(path, lambda: plain_names(_read_safetensors(path)))
    return guarded(path, lambda: plain_names(_state_dict(read_tensors(path))))


def _state_dict(document: Any) -> dict[str, Tensor]:
    """The weights in a file's content."""
    while isinstance(document, dict) and (key := next((k for k in HOLDERS if isinstance(document.get(k), dict)), None)):
        document = document[key]
    if not isinstance(document, dict) or not any(isinstance(value, (Tensor, Inert)) for value in document.values()):
        raise ValueError("expected a dictionary of weights, perhaps under 'model' or 'state_dict'")
    return {str(name): check_plain(value, str(name)) for name, value in document.items()}


def plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the model's own names, without those of wrappers and of larger models around it.

    Raises:
        ValueError: There are several models.
    """
    renamed = {".".join(part for part in name.split(".") if part not in WRAPPERS): name for name in weights}
    prefixes = {name.removesuffix(ANCHOR) for name in renamed if f".{name}".endswith(f".{ANCHOR}")} or {""}
    if len(renamed) < len(weights) or ("" not in prefixes and len(prefixes) > 1):
        raise ValueError(f"weights of several models: {', '.join(name for name in weights if name.endswith(ANCHOR))}")
    prefix = "" if "" in prefixes else prefixes.pop()
    return {ours.removeprefix(prefix): weights[theirs] for ours, theirs in renamed.items()}


def guarded(path: str | Path, load: Callable[[], T]) -> T:
    """Call a function that reads a file. A broken file can make it fail in any way; each becomes an InputError."""
    check_file(path)
    try:
        return load()
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot read the file: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        logger.debug("%s: %s", path, error)
        raise InputError(f"{path}: no checkpoint, or one that holds more than weights; it was not loaded") from None
    except Exception as error:
        logger.debug("%s", path, exc_info=True)
        raise InputError(f"{path}: damaged or no checkpoint ({first_line(error)})") from None


def recorded_config(path: str | Path, model_type: str | None = None) -> DinoSRConfig | None:
    """The model's configuration, from a safetensors header or the ``config.json`` beside the file.

    Args:
        path: The checkpoint; its weights are not read.
        model_type: What the model must be; needed if ``config.json`` is a model table alone, which has no type.

    Returns:
        The configuration; None if nothing is recorded.

    Raises:
        InputError: The file is wrong, or names another model type or none.
    """
    if Path(path).suffix == SAFETENSORS and (cfg := _config_in_header(path)) is not None:
        return _of_type(cfg, model_type, path)
    beside = Path(path).parent / "config.json"
    if not beside.exists():
        return None
    document = read_table(beside)
    if "spidr_type" in document:  # our export to transformers
        document = {"model_type": document["spidr_type"], "model": document.get("settings")}
    if "run" not in document and "model" not in document:  # the bare model table
        return model_config(type_needed(model_type, beside), document, source=str(beside))
    run = document.get("run") or document
    recorded_type = run.get("model_type") if isinstance(run, dict) else None
    recorded_type = recorded_type or type_needed(model_type, beside)
    return _of_type(model_config(recorded_type, document.get("model") or {}, source=str(beside)), model_type, beside)


def _of_type(cfg: DinoSRConfig, model_type: str | None, source: str | Path) -> DinoSRConfig:
    if model_type not in (None, type_of(cfg)):
        raise InputError(f"{source}: the model is of type {type_of(cfg)!r}, asked for was {model_type!r}")
    return cfg


def type_of(cfg: DinoSRConfig) -> str:
    """The model type of a configuration."""
    return "spidr" if isinstance(cfg, SpidRConfig) else "dinosr"


def type_needed(model_type: str | None, source: str | Path | None) -> str:
    """Return the model type.

    Raises:
        InputError: It is None.
    """
    if model_type is None:
        where = f"{source}: this file does not tell which model it is: " if source else ""
        raise InputError(f"{where}model_type is needed: 'spidr' or 'dinosr' (--model-type on the command line)")
    return model_type


# --------------------------------------------------------------------------------------------------------------------
# Into a model


def load_into(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy weights into a model, all or none.

    Args:
        model: The model to change.
        weights: One tensor for each entry of ``model.state_dict()``, of the same shape. What belongs to no part of the
            model is left out, with a warning.
        source: Where the weights come from, for messages.

    Raises:
        InputError: Entries are missing, unknown, of another shape or not finite; the message names them.
    """
    model.load_state_dict(fitting(model, weights, source))


def fitting(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Check weights as :func:`load_into` does, and return those that the model needs.

    Args:
        model: The model, perhaps on the meta device.
        weights: Name → tensor.
        source: Where the weights come from, for messages.
    """
    expected = model.state_dict()
    unknown, parts = [name for name in weights if name not in expected], {name.partition(".")[0] for name in expected}
    problems = [
        *_few("missing", [name for name in expected if name not in weights]),
        *_few("unknown", [name for name in unknown if name.partition(".")[0] in parts]),
        *_few(
            "of another shape",
            [
                f"{name} (found {tuple(weights[name].shape)}, expected {tuple(value.shape)})"
                for name, value in expected.items()
                if name in weights and weights[name].shape != value.shape
            ],
        ),
    ]
    foreign = _few("of no part of the model", [name for name in unknown if name.partition(".")[0] not in parts])
    if problems:
        raise InputError(
            f"{source}: not the weights of this {type(model).__name__}: {'; '.join([*problems, *foreign])}"
        )
    found = {name: weights[name] for name in expected}
    largest = {name: _largest(value) for name, value in found.items()}
    if wrong := _few("weights that are not finite", [name for name, value in largest.items() if not value < torch.inf]):
        raise InputError(f"{source}: {wrong[0]}. Use a checkpoint from before the run diverged.")
    if foreign:
        logger.warning("%s: left out: %s", source, foreign[0])
    if huge := _few(f"weights above {LARGEST:g}", [name for name, value in largest.items() if value > LARGEST]):
        logger.warning("%s: %s. Has this run diverged?", source, huge[0])
    return found


def _largest(value: Tensor) -> float:
    """The largest absolute value, NaN if any value is."""
    if not value.numel() or not value.is_floating_point():
        return 0.0
    low, high = torch.aminmax(value if value.dtype in (torch.float32, torch.float64) else value.float())
    return float(torch.maximum(-low, high))


def _few(what: str, names: list[str]) -> list[str]:
    return [f"{what}: {some(names)}"] if names else []


# --------------------------------------------------------------------------------------------------------------------
# safetensors: weights without code, with configuration and checksum in the header

CHECKSUM = "sha256"


def to_safetensors(weights: Mapping[str, Tensor], cfg: DinoSRConfig, **more: str) -> bytes:
    """Serialise weights with their configuration, further strings and a checksum of it all."""
    _library()
    from safetensors.torch import save

    tensors = {name: value.detach().contiguous() for name, value in weights.items()}
    metadata = {"format": "pt", "model_type": type_of(cfg), "model": json.dumps(asdict(cfg)), **more}
    return save(tensors, metadata | {CHECKSUM: checksum(tensors, metadata)})


def checksum(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of names, shapes and bytes of weights, and of metadata."""
    sha256 = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, value in sorted(weights.items()):
        sha256.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        sha256.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    with _library().safe_open(os.fspath(path), framework="pt") as file:
        metadata = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    recorded = metadata.pop(CHECKSUM, None)
    if recorded is None:
        logger.warning("%s: has no checksum: damage would not be noticed", path)
    elif recorded != checksum(weights, metadata):
        raise ValueError("the checksum is wrong: the file has changed since it was written")
    return weights


def _config_in_header(path: str | Path) -> DinoSRConfig | None:
    def read() -> DinoSRConfig | None:
        with _library().safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
        if not {"model_type", "model"} <= metadata.keys():
            return None
        table = json.loads(metadata["model"])
        if not isinstance(table, dict):
            raise InputError(f"{path}: 'model' in the header is not a table")
        return model_config(metadata["model_type"], table, source=str(path))

    return guarded(path, read)


def _library() -> ModuleType:
    with needs_extra("export"):
        import safetensors
    return safetensors

"""Load checkpoints and safetensors files, whoever wrote them, into a model: all of it or nothing.

No code from a file is ever run (see :mod:`spidr.tools.tensors`).
"""

import hashlib
import json
import logging
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spidr.config import DinoSRConfig, SpidRConfig, model_config
from spidr.tools.errors import InputError, first_line, some
from spidr.tools.files import check_file
from spidr.tools.lazy import needs_extra
from spidr.tools.tensors import Inert, check_plain, read_tensors
from spidr.tools.untrusted import read_table

logger = logging.getLogger(__name__)

SAFETENSORS = ".safetensors"
HOLDERS = ("model", "state_dict", "model_state_dict")
"""Keys under which others' files hold their weights, if not at the top."""
WRAPPERS = {"module", "_orig_mod", "model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that DistributedDataParallel, torch.compile, Lightning, transformers and others add."""
ANCHOR = "mask_embedding"
"""The weight that every model has at its top."""
LARGEST = 1e10
"""Larger weights come from a run that has diverged."""
CHECKSUM = "sha256"
"""Where the header of a safetensors file has the checksum of its weights and metadata."""


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
    with guarded(path):
        if Path(path).suffix == SAFETENSORS:
            return _plain_names(_read_safetensors(path))
        return _plain_names(_state_dict(read_tensors(path)))


def _state_dict(document: Any) -> dict[str, Tensor]:
    while isinstance(document, dict) and (key := next((k for k in HOLDERS if isinstance(document.get(k), dict)), None)):
        document = document[key]
    if not isinstance(document, dict) or not any(isinstance(value, (Tensor, Inert)) for value in document.values()):
        raise ValueError("expected a dictionary of weights, perhaps under 'model' or 'state_dict'")
    return {str(name): check_plain(value, str(name)) for name, value in document.items()}


def _plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the model's own names, without those of wrappers and of larger models around it."""
    renamed = {".".join(part for part in name.split(".") if part not in WRAPPERS): name for name in weights}
    prefixes = {name.removesuffix(ANCHOR) for name in renamed if f".{name}".endswith(f".{ANCHOR}")} or {""}
    if len(renamed) < len(weights) or ("" not in prefixes and len(prefixes) > 1):
        raise ValueError(f"weights of several models: {', '.join(name for name in weights if name.endswith(ANCHOR))}")
    prefix = "" if "" in prefixes else prefixes.pop()
    return {ours.removeprefix(prefix): weights[theirs] for ours, theirs in renamed.items()}


@contextmanager
def guarded(path: str | Path) -> Iterator[None]:
    """Turn any error that a broken file causes into an InputError."""
    check_file(path)
    try:
        yield
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
    """Read the model's configuration from a safetensors header or the ``config.json`` beside the file.

    Args:
        path: The checkpoint; its weights are not read.
        model_type: What the model must be; needed if ``config.json`` is a model table alone, which has no type.

    Returns:
        The configuration; None if nothing is recorded.

    Raises:
        InputError: The file is wrong, or names another model type or none.
    """
    if Path(path).suffix == SAFETENSORS and (cfg := _config_in_header(path)) is not None:
        return of_type(cfg, model_type, path)
    beside = Path(path).parent / "config.json"
    if not beside.exists():
        return None
    document = read_table(beside)
    if "spidr_type" in document:  # our export to transformers
        recorded, table = document["spidr_type"], document.get("settings")
    elif "run" in document or "model" in document:
        run = document.get("run") or document
        recorded, table = run.get("model_type") if isinstance(run, dict) else None, document.get("model")
    else:  # the bare model table
        recorded, table = None, document
    cfg = model_config(recorded or type_needed(model_type, beside), table or {}, source=str(beside))
    return of_type(cfg, model_type, beside)


def of_type(cfg: DinoSRConfig, model_type: str | None, source: str | Path) -> DinoSRConfig:
    """Refuse a configuration of another model type than was asked for, if one was."""
    if model_type not in (None, type_of(cfg)):
        raise InputError(f"{source}: the model is of type {type_of(cfg)!r}, asked for was {model_type!r}")
    return cfg


def type_of(cfg: DinoSRConfig) -> str:
    """The model type of a configuration."""
    return "spidr" if isinstance(cfg, SpidRConfig) else "dinosr"


def type_needed(model_type: str | None, source: str | Path | None) -> str:
    """Refuse None as a model type."""
    if model_type is None:
        where = f"{source}: this file does not tell which model it is: " if source else ""
        raise InputError(f"{where}model_type is needed: 'spidr' or 'dinosr' (--model-type on the command line)")
    return model_type


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
    """Pick the weights that a model needs, and check them as :func:`load_into` does. It may be on the meta device."""
    expected = model.state_dict()
    parts = {name.partition(".")[0] for name in expected}
    unknown = [name for name in weights if name not in expected]
    foreign = [name for name in unknown if name.partition(".")[0] not in parts]
    shapes = {name: (tuple(weights[name].shape), tuple(x.shape)) for name, x in expected.items() if name in weights}
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unknown": [name for name in unknown if name.partition(".")[0] in parts],
        "of another shape": [
            f"{name} (found {has}, expected {needs})" for name, (has, needs) in shapes.items() if has != needs
        ],
    }
    if any(problems.values()):
        problems["of no part of the model"] = foreign
        named = "; ".join(f"{what}: {some(names)}" for what, names in problems.items() if names)
        raise InputError(f"{source}: not the weights of this {type(model).__name__}: {named}")
    found = {name: weights[name] for name in expected}
    largest = {name: _largest(value) for name, value in found.items()}
    if wrong := [name for name, value in largest.items() if not value < torch.inf]:
        remedy = "Use a checkpoint from before the run diverged."
        raise InputError(f"{source}: weights that are not finite: {some(wrong)}. {remedy}")
    if foreign:
        logger.warning("%s: left out: of no part of the model: %s", source, some(foreign))
    if huge := [name for name, value in largest.items() if value > LARGEST]:
        logger.warning("%s: weights above %g: %s. Has this run diverged?", source, LARGEST, some(huge))
    return found


def _largest(value: Tensor) -> float:
    """The largest absolute value, NaN if any value is."""
    if not value.numel() or not value.is_floating_point():
        return 0.0
    low, high = torch.aminmax(value if value.dtype in (torch.float32, torch.float64) else value.float())
    return float(torch.maximum(-low, high))


def to_safetensors(weights: Mapping[str, Tensor], cfg: DinoSRConfig, **more: str) -> bytes:
    """Serialise weights with their configuration, further strings and a checksum of it all."""
    with needs_extra("export"):
        import safetensors.torch
    tensors = {name: value.detach().contiguous() for name, value in weights.items()}
    metadata = {"format": "pt", "model_type": type_of(cfg), "model": json.dumps(asdict(cfg)), **more}
    return safetensors.torch.save(tensors, metadata | {CHECKSUM: checksum(tensors, metadata)})


def checksum(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of names, shapes and bytes of weights, and of metadata."""
    sha256 = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, value in sorted(weights.items()):
        sha256.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        sha256.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    with _open_safetensors(path) as file:
        metadata = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    recorded = metadata.pop(CHECKSUM, None)
    if recorded is None:
        logger.warning("%s: has no checksum: damage would not be noticed", path)
    elif recorded != checksum(weights, metadata):
        raise ValueError("the checksum is wrong: the file has changed since it was written")
    return weights


def _config_in_header(path: str | Path) -> DinoSRConfig | None:
    with guarded(path):
        with _open_safetensors(path) as file:
            metadata = file.metadata() or {}
        if not {"model_type", "model"} <= metadata.keys():
            return None
        table = json.loads(metadata["model"])
        if not isinstance(table, dict):
            raise InputError(f"{path}: 'model' in the header is not a table")
        return model_config(metadata["model_type"], table, source=str(path))


def _open_safetensors(path: str | Path) -> Any:
    with needs_extra("export"):
        from safetensors import safe_open
    return safe_open(os.fspath(path), framework="pt")

"""fairseq's checkpoints of DinoSR under our names."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spidr.models.weights import guarded
from spidr.tools.tensors import check_plain, read_tensors

# Names in fairseq and ours; the first pattern that matches the whole name holds.
_TRANSFORMER_NAMES = (
    (r"pos_conv\.(\d+)\.0\.(.+)", r"pos_conv_embed.convs.\1.\2"),
    (r"(layers\.\d+)\.self_attn\.out_proj\.(.+)", r"\1.attention.proj.\2"),
    (r"(layers\.\d+)\.self_attn\.([qkv])_proj\.(.+)", r"\1.attention.\2.\3"),  # joined to qkv afterwards
    (r"(layers\.\d+)\.self_attn_layer_norm\.(.+)", r"\1.layer_norm.\2"),
    (r"(layers\.\d+)\.fc1\.(.+)", r"\1.feed_forward.intermediate_dense.\2"),
    (r"(layers\.\d+)\.fc2\.(.+)", r"\1.feed_forward.output_dense.\2"),
)
_MODEL_NAMES = (
    *((rf"encoder\.{theirs}", rf"student.{ours}") for theirs, ours in _TRANSFORMER_NAMES),
    (r"encoder\.(.+)", r"student.\1"),
    (r"mask_emb", r"mask_embedding"),
    (r"layer_norm\.(.+)", r"feature_projection.layer_norm.\1"),
    (r"post_extract_proj\.(.+)", r"feature_projection.projection.\1"),
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.(.+)", r"feature_extractor.conv_layers.\1.conv.\2"),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.1\.(.+)", r"feature_extractor.conv_layers.\1.layer_norm.\2"),
    (r"heads\.(\d+)\.(.+)", r"heads.\1.0.\2"),
    (r"_codebook(\d+)", r"codebooks.\1.codebook"),
    (r"_codebook_cnts(\d+)", r"codebooks.\1.counts"),
)


def load_fairseq_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a fairseq checkpoint of DinoSR.

    Args:
        path: A file with the student, heads and codebooks under ``"model"``, the teacher under ``"model"]["_ema"``, and
            the number of steps in ``"last_optimizer_state"``. The configuration and metrics beside them are ignored.

    Returns:
        As :func:`spidr.models.weights.read_weights`. Unknown names are kept.

    Raises:
        InputError: The file is missing, truncated or no checkpoint of DinoSR.
    """
    with guarded(path):
        return _convert(read_tensors(path))


def _convert(document: Any) -> dict[str, Tensor]:
    weights = document.get("model") if isinstance(document, dict) else None
    teacher = weights.get("_ema") if isinstance(weights, dict) else None
    if not isinstance(weights, dict) or not isinstance(teacher, dict):
        raise ValueError("expected fairseq's DinoSR: weights under 'model', the teacher's in it under '_ema'")
    renamed = {_rename(name, _MODEL_NAMES): value for name, value in weights.items() if name != "_ema"}
    renamed |= {f"teacher.{_rename(name, _TRANSFORMER_NAMES)}": value for name, value in teacher.items()}
    renamed = {name: check_plain(value, name) for name, value in renamed.items()}
    for name in [name for name in renamed if ".attention.q." in name]:
        parts = [name.replace(".attention.q.", f".attention.{letter}.") for letter in "qkv"]
        if all(part in renamed for part in parts):
            renamed[name.replace(".attention.q.", ".attention.qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    step = torch.tensor([_step(document.get("last_optimizer_state"))], device="cpu")
    return renamed | {"current_step": step}


def _rename(name: Any, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in patterns:
        if match := re.fullmatch(pattern, str(name)):
            return match.expand(replacement)
    return str(name)


def _step(optimizer_state: Any) -> int:
    """The number of updates of the first parameter, 0 if the file does not say."""
    for key in ("state", 0, "step"):
        optimizer_state = optimizer_state.get(key) if isinstance(optimizer_state, dict) else None
    return int(optimizer_state) if isinstance(optimizer_state, (int, float, Tensor)) else 0

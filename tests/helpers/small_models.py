"""Models small enough for tests, and models with recorded outputs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spidr.config import DEFAULT_CONV_LAYER_CONFIG, DinoSRConfig, model_config
from spidr.models import DinoSR, build_model

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass
class GoldenCase:
    """A small model with inputs and expected outputs."""

    folder: Path

    def __post_init__(self) -> None:
        document = json.loads((self.folder / "config.json").read_text())
        self.model_type: str = document["model_type"]
        self.cfg: DinoSRConfig = model_config(self.model_type, document["model"])
        self.tensors: dict[str, Any] = torch.load(self.folder / "tensors.pt")
        self.trajectory: dict[str, Any] = json.loads((self.folder / "trajectory.json").read_text())

    def weights(self, name: str = "checkpoint.pt") -> dict[str, torch.Tensor]:
        return torch.load(self.folder / name)["model"]

    def model(self) -> DinoSR:
        model = build_model(cfg=self.cfg)
        model.load_state_dict(self.weights())
        return model


TINY = {
    "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 2), (16, 3, 2), (16, 2, 2)],
    "encoder_embed_dim": 32,
    "encoder_pos_conv_kernel": 15,
    "encoder_pos_conv_groups": 4,
    "encoder_pos_conv_depth": 3,
    "encoder_num_layers": 4,
    "encoder_num_heads": 4,
    "encoder_ff_interm_features": 64,
    "codebook_size": 12,
    "num_codebooks": 3,
}
AT_50_HZ = {"extractor_conv_layer_config": [(16, kernel, stride) for _, kernel, stride in DEFAULT_CONV_LAYER_CONFIG]}
"""Settings for the usual frame rate."""


def tiny_config(model_type: str = "spidr", **changes: Any) -> DinoSRConfig:
    """The configuration of a model small enough for tests; keyword arguments change settings."""
    return model_config(model_type, {**TINY, **changes})


def tiny_model(model_type: str = "spidr", seed: int = 0, **changes: Any) -> DinoSR:
    torch.manual_seed(seed)
    return build_model(cfg=tiny_config(model_type, **changes))

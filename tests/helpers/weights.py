"""Small models whose weights no freshly made model has."""

from typing import Any

import torch
from torch import Tensor

from spidr.config import DinoSRConfig, SpidRConfig
from spidr.models import DinoSR

SMALL: dict[str, Any] = {
    "extractor_conv_layer_config": [(8, 10, 5), (8, 3, 2)],
    "encoder_embed_dim": 16,
    "encoder_pos_conv_kernel": 6,
    "encoder_pos_conv_groups": 4,
    "encoder_pos_conv_depth": 2,
    "encoder_num_layers": 3,
    "encoder_num_heads": 2,
    "encoder_ff_interm_features": 24,
    "codebook_size": 5,
    "num_codebooks": 2,
}
SPIDR, DINOSR = SpidRConfig(**SMALL), DinoSRConfig(**SMALL)
FAIRSEQ = DinoSRConfig(**SMALL, encoder_qkv_bias=True)


def random_weights(model: DinoSR, seed: int = 0) -> dict[str, Tensor]:
    """Random values for every entry of the state dict."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else torch.tensor([77])
        for name, value in model.state_dict().items()
    }


def same_weights(model: DinoSR, expected: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in state)


def damage(content: bytes, how: str) -> bytes:
    middle = len(content) // 2
    return {
        "truncated": content[:middle],
        "empty": b"",
        "flipped": content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :],
        "foreign": b"PK\x03\x04" + bytes(1000),
    }[how]

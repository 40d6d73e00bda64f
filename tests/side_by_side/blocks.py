"""Outputs of the blocks in ``spidr.models.components``, with weights that depend on names and shapes only.

python blocks.py OUTPUT.pt     # a dictionary of tensors
"""

import hashlib
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from spidr.models.components import (
    ConvLayerBlock,
    ConvPositionalEmbedding,
    FeatureExtractor,
    FeatureProjection,
    FeedForward,
    LayerNorm,
    SelfAttention,
    Transformer,
    TransformerLayer,
    mask_from_index,
)


def draw(name: str, *shape: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, value in module.state_dict().items():
            value.copy_(draw(name, *value.shape) / 3)
    return module


def transformer(*, layer_norm_first: bool, conv_depth: int = 2, weight_normed: bool = False) -> Transformer:
    """A transformer of post-norm or pre-norm blocks; HuBERT's, if ``weight_normed``."""
    positions = ConvPositionalEmbedding(8, kernel_size=8 if weight_normed else 9, groups=2, depth=conv_depth)
    if weight_normed:
        positions.convs[0] = weight_norm(positions.convs[0], dim=2)
        positions.layer_norm = nn.Identity()
    layers = nn.ModuleList()
    for _ in range(3):
        attention = SelfAttention(8, 2, qkv_bias=True, dropout=0.1)
        layers.append(TransformerLayer(attention, 0.1, FeedForward(8, 16, 0.1), layer_norm_first=layer_norm_first))
    return Transformer(layers, positions, 0.1, 0.1, layer_norm_first=not layer_norm_first)


@torch.no_grad()
def outputs() -> dict[str, Tensor]:
    found: dict[str, Any] = {}
    waveforms, x = draw("waveforms", 2, 400), draw("x", 2, 20, 8)
    lengths = torch.tensor([20, 13])
    mask = (torch.arange(20) < lengths[:, None])[:, None, None]
    for mode in ("layer_norm", "group_norm", "none"):
        blocks = nn.ModuleList()
        for i, (channels, kernel, stride) in enumerate([(6, 10, 5), (4, 3, 2), (4, 2, 2)]):
            norm = LayerNorm(channels) if mode == "layer_norm" else None
            if mode == "group_norm" and i == 0:
                norm = nn.GroupNorm(channels, channels)
            block = ConvLayerBlock(
                blocks[-1].conv.out_channels if i else 1, channels, kernel, stride, norm, bias=i == 1
            )
            assert (block.kernel_size, block.stride) == (kernel, stride)
            blocks.append(block)
        found[f"extractor {mode}"] = filled(FeatureExtractor(blocks))(waveforms)
        found[f"block {mode}"] = blocks[0](waveforms.unsqueeze(1))
    found["layer norm"] = filled(LayerNorm(8))(x.transpose(1, 2))
    found["projection"] = filled(FeatureProjection(8, 6))(x)
    found["feed-forward"] = filled(FeedForward(8, 16, 0.1)).eval()(x)
    attention = filled(SelfAttention(8, 2, qkv_bias=False)).eval()
    found["attention"], found["attention masked"] = attention(x), attention(x, mask)
    for pre in (False, True):
        for hubert in (False, True):
            model = filled(
                transformer(layer_norm_first=pre, conv_depth=1 if hubert else 2, weight_normed=hubert)
            ).eval()
            name = f"transformer {'pre' if pre else 'post'}-norm{', weight norm' if hubert else ''}"
            found[name], found[f"{name}, masked"] = model(x), model(x, mask)
            found[f"{name}, positions"] = model.pos_conv_embed(x, mask)
            found[f"{name}, layers"] = torch.stack(model.get_intermediate_outputs(x, mask, 2))
            found[f"{name}, after"] = torch.stack(model.get_intermediate_outputs(x, before_residual=False))
            found[f"{name}, layer"] = torch.stack(model.layers[0](x, mask))
    found["mask"] = mask_from_index(torch.tensor([[0, 2], [1, 3]]), 5)
    return found


if __name__ == "__main__":
    torch.save(outputs(), sys.argv[1])

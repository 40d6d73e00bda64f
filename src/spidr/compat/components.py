"""Blocks of ``spidr.models.components``, from which other packages assemble models of their own.

Parameters are named as in published checkpoints. Shapes are (B, S) for waveforms, (B, C, T) in convolutions, (B, T, D)
elsewhere. Attention masks are boolean, True where to attend, broadcastable to (B, 1, T, T).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spidr.models.extractor import FeatureProjection
from spidr.models.kernels import Dropout
from spidr.models.transformer import Attention, Block, FeedForward, PositionalConvolution
from spidr.models.transformer import Transformer as OurTransformer

__all__ = [
    "ConvLayerBlock",
    "ConvPositionalEmbedding",
    "FeatureExtractor",
    "FeatureProjection",
    "FeedForward",
    "LayerNorm",
    "SelfAttention",
    "Transformer",
    "TransformerLayer",
    "mask_from_index",
    "select_masked",
]


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, T)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalise every frame."""
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class ConvLayerBlock(nn.Module):
    """Convolution without padding, norm if any, exact GELU: (B, C, T) to (B, C', T')."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        layer_norm: nn.Module | None,
        *,
        bias: bool,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        self.layer_norm = layer_norm
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, bias=bias)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the kernel: Kaiming normal."""
        nn.init.kaiming_normal_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, activate."""
        x = self.conv(x)
        return F.gelu(x if self.layer_norm is None else self.layer_norm(x))


class FeatureExtractor(nn.Module):
    """Convolution blocks in a row: (B, S) to (B, T, C)."""

    def __init__(self, conv_layers: nn.ModuleList) -> None:
        super().__init__()
        self.conv_layers = conv_layers

    def forward(self, x: Tensor) -> Tensor:
        """Turn waveforms into frames."""
        x = x.unsqueeze(1)
        for layer in self.conv_layers:
            x = layer(x)
        return x.transpose(1, 2)


class ConvPositionalEmbedding(PositionalConvolution):
    """Grouped convolutions over time; their output is to be added to the input."""

    def __init__(self, embed_dim: int, kernel_size: int, groups: int, depth: int) -> None:
        super().__init__(embed_dim, kernel_size, groups, depth)
        self.embed_dim = embed_dim


class SelfAttention(Attention):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, embed_dim: int, num_heads: int, *, qkv_bias: bool, dropout: float = 0.0) -> None:
        super().__init__(embed_dim, num_heads, dropout, qkv_bias=qkv_bias)
        self.embed_dim = embed_dim


class TransformerLayer(Block):
    """A block; see :class:`spidr.models.transformer.Block`."""

    def __init__(
        self, attention: Attention, dropout: float, feed_forward: FeedForward, *, layer_norm_first: bool
    ) -> None:
        nn.Module.__init__(self)
        dim = attention.embed_dim
        self.attention = attention
        self.dropout = Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim)
        self.feed_forward = feed_forward
        self.final_layer_norm = nn.LayerNorm(dim)
        self.layer_norm_first = layer_norm_first


class Transformer(OurTransformer):
    """Positional convolutions and blocks; see :class:`spidr.models.transformer.Transformer`.

    ``layer_norm_first`` normalises the blocks' input instead of their output: True goes with post-norm blocks.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        pos_conv_embed: PositionalConvolution,
        dropout: float,
        layer_drop: float,
        *,
        layer_norm_first: bool,
    ) -> None:
        nn.Module.__init__(self)
        self.pos_conv_embed = pos_conv_embed
        self.layer_norm = nn.LayerNorm(pos_conv_embed.embed_dim)
        self.dropout = Dropout(dropout)
        self.layers = layers
        self.layer_norm_first = not layer_norm_first  # ours says where the blocks have their norms
        self.layer_drop = layer_drop


def mask_from_index(index: Tensor, size: int) -> Tensor:
    """Boolean mask (B, ``size``) of the frames in ``index (B, M)``; a boolean mask is returned as it is."""
    if index.dtype == torch.bool:
        return index
    return torch.zeros(len(index), size, dtype=torch.bool, device=index.device).scatter_(1, index, value=True)


def select_masked(x: Tensor, index: Tensor) -> Tensor:
    """The masked frames of (B, T, D), row by row, (N, D); ``index`` is (B, M), or a boolean mask (B, T)."""
    return x[mask_from_index(index, x.shape[1])]

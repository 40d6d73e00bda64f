"""Blocks of ``spidr.models.components``, from which other packages assemble models of their own.

Parameters are named as in published checkpoints. Shapes are (B, S) for waveforms, (B, C, T) in convolutions, (B, T, D)
elsewhere. Attention masks are boolean, True where to attend, broadcastable to (B, 1, T, T).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spidr.models.extractor import ConvLayerBlock, FeatureExtractor, FeatureProjection, LayerNorm
from spidr.models.transformer import ConvPositionalEmbedding, FeedForward, SelfAttention, Transformer, TransformerLayer

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


def mask_from_index(index: Tensor, size: int) -> Tensor:
    """Boolean mask (B, ``size``) of the frames in ``index (B, M)``; a boolean mask is returned as it is."""
    if index.dtype == torch.bool:
        return index
    return torch.zeros(len(index), size, dtype=torch.bool, device=index.device).scatter_(1, index, value=True)


def select_masked(x: Tensor, index: Tensor) -> Tensor:
    """The masked frames of (B, T, D), row by row, (N, D); ``index`` is (B, M), or a boolean mask (B, T)."""
    return x[mask_from_index(index, x.shape[1])]

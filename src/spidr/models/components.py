"""The blocks of the models, where published packages have them."""

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
]


def mask_from_index(index: Tensor, size: int) -> Tensor:
    """Boolean mask (B, ``size``) of the frames in ``index (B, M)``; a boolean mask is returned as it is."""
    if index.dtype == torch.bool:
        return index
    return torch.zeros(len(index), size, dtype=torch.bool, device=index.device).scatter_(1, index, value=True)

"""The blocks of the models, where published packages have them."""

from spidr.models.dinosr import mask_from_index
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

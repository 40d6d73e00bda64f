"""The transformer of student and teacher: positional convolutions and post-norm or pre-norm blocks.

Attention masks are boolean, True where to attend, broadcastable to (B, 1, T, T); the first query row says which frames
exist. None means that all do.
"""

import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spidr.config import DinoSRConfig
from spidr.models.extractor import LayerNorm
from spidr.models.kernels import (
    Dropout,
    attend,
    convolve,
    convolve_by_products,
    feed_forward,
    feeds_forward,
    keeps_frames,
    known,
    through,
    through_gelu,
)
from spidr.models.long import first_input, is_long, run_block


def frame_mask(x: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Which frames of (B, T, D) exist, (B, T, 1); None: all."""
    if attention_mask is None:
        return None
    return attention_mask[..., 0, :].expand(x.shape[0], 1, x.shape[1]).transpose(1, 2)


@known
class ConvPositionalEmbedding(nn.Module):
    """Grouped convolutions over time whose output is added to the features: the model's only sense of position.

    Args:
        embed_dim: Width D.
        kernel_size: Frames that the convolutions together see, about; each sees ``max(3, kernel_size // depth)``.
        groups: Groups of channels.
        depth: How many convolutions.

    Attributes:
        by_products: Compute each convolution as a batched product, which may be faster on a GPU.
    """

    by_products: bool = False

    def __init__(self, embed_dim: int, kernel_size: int, groups: int, depth: int) -> None:
        super().__init__()
        self.embed_dim, self.kernel_size, self.groups, self.depth = embed_dim, kernel_size, groups, depth
        self.layer_kernel_size = kernel = max(3, kernel_size // depth)
        self.num_remove = 1 - kernel % 2  # an even kernel gives one frame too many, at the end
        self.layer_norm = LayerNorm(embed_dim, elementwise_affine=False)
        self.convs = nn.ModuleList(
            nn.Conv1d(embed_dim, embed_dim, kernel, padding=kernel // 2, groups=groups) for _ in range(depth)
        )

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        exists = frame_mask(x, attention_mask)
        for conv in self.convs:
            if exists is not None:
                x = x * exists
            x = x.transpose(1, 2)
            if self.by_products and keeps_frames(conv):
                x = convolve_by_products(x, conv.weight, conv.bias, int(conv.padding[0]), conv.groups, chunk=16)
            else:
                x = convolve(x, conv)
            x = x[..., : -self.num_remove] if self.num_remove else x
            x = F.gelu(self.layer_norm(x).transpose(1, 2))
        return x if exists is None else x * exists


@known
class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values.

    Args:
        embed_dim: Width D.
        num_heads: Number of heads.
        qkv_bias: Whether the projection has a bias.
        dropout: Probability to drop an attention weight in training.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, qkv_bias: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.qkv.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        if qkv_bias:
            nn.init.zeros_(self.qkv.bias)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        qkv = through(self.qkv, x)
        return through(self.proj, self.attend_heads(qkv, self.num_heads, attention_mask))

    def attend_heads(self, qkv: Tensor, num_heads: int, attention_mask: Tensor | None) -> Tensor:
        """Attention of some heads, (B, T, 3 * H * D_head) to (B, T, H * D_head)."""
        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = attend(q, k, v, attention_mask, self.dropout if self.training else 0.0)
        return x.transpose(1, 2).flatten(2)


@known
class FeedForward(nn.Module):
    """Linear, exact GELU, dropout, linear.

    Args:
        embed_dim: Width D.
        interm_features: Width in between.
        interm_dropout: Probability to drop an activation in between.
    """

    def __init__(self, embed_dim: int, interm_features: int, interm_dropout: float) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(embed_dim, interm_features)
        self.intermediate_dropout = Dropout(interm_dropout)
        self.output_dense = nn.Linear(interm_features, embed_dim)
        for dense in (self.intermediate_dense, self.output_dense):
            nn.init.normal_(dense.weight, std=0.02)
            nn.init.zeros_(dense.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        first, dropout, second = self.intermediate_dense, self.intermediate_dropout, self.output_dense
        if feeds_forward(first, dropout, second, x):
            return feed_forward(first, dropout, second, x)
        return through(second, dropout(through_gelu(first, x)))


@known
class TransformerLayer(nn.Module):
    """Attention and feed-forward, each with a residual connection and a LayerNorm before or after.

    Args:
        attention: Self-attention.
        dropout: Probability to drop an element before a residual addition.
        feed_forward: Feed-forward network.
        layer_norm_first: LayerNorm before attention and feed-forward (pre-norm) instead of after the additions.
    """

    def __init__(
        self, attention: SelfAttention, dropout: float, feed_forward: FeedForward, *, layer_norm_first: bool
    ) -> None:
        super().__init__()
        self.attention = attention
        self.dropout = Dropout(dropout)
        self.layer_norm = nn.LayerNorm(attention.embed_dim)
        self.feed_forward = feed_forward
        self.final_layer_norm = nn.LayerNorm(attention.embed_dim)
        self.layer_norm_first = layer_norm_first

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The block's output and its feed-forward output before the residual addition, both (B, T, D)."""
        seen = self.layer_norm(x) if self.layer_norm_first else x
        return self.after_attention(x + self.dropout(self.attention(seen, attention_mask=attention_mask)))

    def after_attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's outputs, given the sum of its input and its attention; each frame on its own."""
        if self.layer_norm_first:
            forwarded = self.feed_forward(self.final_layer_norm(x))
            return x + self.dropout(forwarded), forwarded
        x = self.layer_norm(x)
        forwarded = self.feed_forward(x)
        return self.final_layer_norm(x + self.dropout(forwarded)), forwarded


@known
class Transformer(nn.Module):
    """Positional convolutions, then blocks.

    Args:
        layers: The blocks.
        pos_conv_embed: Positional convolutions.
        dropout: Probability to drop an element of the first block's input.
        layer_drop: Probability to skip a block in training.
        layer_norm_first: LayerNorm before the blocks, as post-norm blocks need it, instead of after the last one.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        pos_conv_embed: ConvPositionalEmbedding,
        dropout: float,
        layer_drop: float,
        *,
        layer_norm_first: bool,
    ) -> None:
        super().__init__()
        self.pos_conv_embed = pos_conv_embed
        self.layer_norm = nn.LayerNorm(pos_conv_embed.embed_dim)
        self.dropout = Dropout(dropout)
        self.layers = layers
        self.layer_norm_first = layer_norm_first
        self.layer_drop = layer_drop

    @classmethod
    def build(cls, cfg: DinoSRConfig) -> Self:
        """A new transformer of a model's configuration."""
        dim, norm_first = cfg.encoder_embed_dim, cfg.encoder_layer_norm_first
        positions = ConvPositionalEmbedding(
            dim, cfg.encoder_pos_conv_kernel, cfg.encoder_pos_conv_groups, cfg.encoder_pos_conv_depth
        )
        layers = nn.ModuleList()
        for _ in range(cfg.encoder_num_layers):
            attention = SelfAttention(
                dim, cfg.encoder_num_heads, qkv_bias=cfg.encoder_qkv_bias, dropout=cfg.encoder_attention_dropout
            )
            feed_forward = FeedForward(dim, cfg.encoder_ff_interm_features, cfg.encoder_ff_interm_dropout)
            layers.append(TransformerLayer(attention, cfg.encoder_dropout, feed_forward, layer_norm_first=norm_first))
        return cls(layers, positions, cfg.encoder_dropout, cfg.encoder_layer_drop, layer_norm_first=not norm_first)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The final output, (B, T, D): the last block's, after the final LayerNorm in the pre-norm model."""
        return self.finish(self._run(x, attention_mask, range(len(self.layers), len(self.layers)))[0])

    def get_intermediate_outputs(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        num_layers: int | None = None,
        *,
        before_residual: bool = True,
        skip: int = 0,
    ) -> list[Tensor]:
        """Outputs of the first ``num_layers`` blocks (default all), without the final LayerNorm.

        Args:
            x: Projected features, (B, T, D).
            attention_mask: See the module.
            num_layers: How many blocks to run.
            before_residual: Give each block's feed-forward output before the residual addition, as SpidR's heads and
                the teacher's targets use it, instead of the block's full output.
            skip: How many of the first outputs to leave out of the list, and of memory.

        Returns:
            ``num_layers - skip`` tensors (B, T, D).

        Raises:
            ValueError: If ``num_layers`` is not between 1 and the number of blocks.
        """
        num_layers = len(self.layers) if num_layers is None else num_layers
        if not 1 <= num_layers <= len(self.layers):
            raise ValueError(f"num_layers must be between 1 and {len(self.layers)}, not {num_layers}")
        return self._run(x, attention_mask, range(skip, num_layers), before_residual=before_residual)[1]

    def _run(
        self, x: Tensor, attention_mask: Tensor | None, kept: range, *, before_residual: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the blocks up to the last of ``kept``: the residual stream after them, and the outputs of those kept."""
        in_pieces = is_long(self, x)
        if in_pieces:
            x = first_input(self, x, attention_mask)
        else:
            x = self.dropout(self.start(x, self.pos_conv_embed(x, attention_mask)))
        outputs = []
        for i, layer in enumerate(self.layers[: kept.stop]):
            output, forwarded = run_block(layer, x, attention_mask) if in_pieces else layer(x, attention_mask)
            if i >= kept.start:
                outputs.append(forwarded if before_residual else output)
            if self.training and self.layer_drop > 0:
                # Drawn on the device and computed either way: no synchronisation, and a dropped block's parameters
                # get the zero gradient that distributed training waits for.
                output = torch.where(torch.rand((), device=x.device) < self.layer_drop, x, output)
            x = output
        return x, outputs

    def start(self, x: Tensor, positions: Tensor) -> Tensor:
        """The first block's input, before dropout."""
        x = x + positions
        return self.layer_norm(x) if self.layer_norm_first else x

    def finish(self, x: Tensor) -> Tensor:
        """The final output, given the last block's."""
        return x if self.layer_norm_first else self.layer_norm(x)

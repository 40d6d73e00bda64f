"""The transformer of student and teacher: positional convolutions and post-norm or pre-norm blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spidr.config import DinoSRConfig
from spidr.models.kernels import Dropout, attend, recomputed

LONG = 16_384
"""Frames above which inference goes piece by piece, so that a few (T, D) tensors are all there is at a time."""

PIECE = LONG // 8
"""Frames of such a piece: the feed-forward's hidden layer takes 25 MB in the base models."""


def _in_pieces(num_frames: int) -> bool:
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled() and num_frames > LONG


def _piecewise(function: Callable[..., Tensor], *inputs: Tensor, into: Tensor | None = None) -> Tensor:
    """What a function gives for (B, T, ...) tensors, ``PIECE`` frames at a time.

    The result takes the place of ``into``, a tensor that nobody needs any more, if it is of the same type.
    """
    num_frames = inputs[0].shape[1]
    out: Tensor | None = None
    for start in range(0, num_frames, PIECE):
        part = slice(start, start + PIECE)
        found = function(*(x[:, part] for x in inputs))
        if out is None:
            fits = into is not None and into.dtype == found.dtype
            out = into if fits else found.new_empty(found.shape[0], num_frames, *found.shape[2:])
        cast("Tensor", out)[:, part] = found
    return cast("Tensor", out)


class PositionalConvolution(nn.Module):
    """Grouped convolutions over time whose output is added to the features: the model's only sense of position."""

    def __init__(self, dim: int, kernel: int, groups: int, depth: int) -> None:
        super().__init__()
        kernel = max(3, kernel // depth)
        self.convs = nn.ModuleList(
            nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups) for _ in range(depth)
        )
        self.dim = dim

    def forward(self, x: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); ``frame_mask`` (B, T, 1) is True on the frames that exist."""
        num_frames = x.shape[1]
        if not _in_pieces(num_frames):
            return self._convolve(x, frame_mask)
        around = sum(conv.kernel_size[0] // 2 for conv in self._layers())  # what a frame sees on each side
        out = torch.empty_like(x)
        for start in range(0, num_frames, LONG):
            left, stop = max(0, start - around), min(start + LONG, num_frames)
            seen = slice(left, stop + around)
            found = self._convolve(x[:, seen], None if frame_mask is None else frame_mask[:, seen])
            out[:, start:stop] = found[:, start - left : stop - left]
        return out

    def _layers(self) -> list[nn.Conv1d]:
        return cast("list[nn.Conv1d]", list(self.convs))

    def _convolve(self, x: Tensor, frame_mask: Tensor | None) -> Tensor:
        num_frames = x.shape[1]
        for conv in self.convs:
            if frame_mask is not None:
                x = x * frame_mask
            # An even kernel gives one frame too many, at the end.
            x = conv(x.transpose(1, 2))[..., :num_frames].transpose(1, 2)
            x = F.gelu(F.layer_norm(x, (self.dim,)))
        return x if frame_mask is None else x * frame_mask


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int, dropout: float, *, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        if qkv_bias:
            nn.init.zeros_(self.qkv.bias)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); ``attention_mask``, broadcastable to (B, 1, T, T), is True where to attend."""
        if not _in_pieces(x.shape[1]):
            return self.proj(self._attend(self.qkv(x), self.num_heads, attention_mask))
        # Queries, keys and values of all heads at once would be the largest tensor of all.
        weight = self.qkv.weight.unflatten(0, (3, self.num_heads, -1))
        bias = None if self.qkv.bias is None else self.qkv.bias.unflatten(0, (3, self.num_heads, -1))
        size = weight.shape[2]
        heads: Tensor | None = None
        for head in range(self.num_heads):
            head_bias = None if bias is None else bias[:, head].flatten()
            found = self._attend(F.linear(x, weight[:, head].flatten(0, 1), head_bias), 1, attention_mask)
            heads = found.new_empty(*found.shape[:2], self.num_heads * size) if heads is None else heads
            heads[..., head * size : (head + 1) * size] = found
        return _piecewise(self.proj, cast("Tensor", heads), into=heads)

    def _attend(self, qkv: Tensor, num_heads: int, attention_mask: Tensor | None) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = attend(q, k, v, attention_mask, self.dropout if self.training else 0.0)
        return x.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """Linear, exact GELU, dropout, linear."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(dim, hidden)
        self.dropout = Dropout(dropout)
        self.output_dense = nn.Linear(hidden, dim)
        for linear in (self.intermediate_dense, self.output_dense):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return _piecewise(self._expand_and_reduce, x) if _in_pieces(x.shape[1]) else self._expand_and_reduce(x)

    def _expand_and_reduce(self, x: Tensor) -> Tensor:
        return recomputed(self._activate_and_reduce, self.intermediate_dense(x), draws=self.dropout.p > 0)

    def _activate_and_reduce(self, x: Tensor) -> Tensor:
        return self.output_dense(self.dropout(F.gelu(x)))


class Block(nn.Module):
    """Attention and feed-forward, each with a residual connection and a LayerNorm before or after."""

    def __init__(self, cfg: DinoSRConfig) -> None:
        super().__init__()
        dim = cfg.encoder_embed_dim
        self.attention = Attention(
            dim, cfg.encoder_num_heads, cfg.encoder_attention_dropout, qkv_bias=cfg.encoder_qkv_bias
        )
        self.dropout = Dropout(cfg.encoder_dropout)
        self.layer_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, cfg.encoder_ff_interm_features, cfg.encoder_ff_interm_dropout)
        self.final_layer_norm = nn.LayerNorm(dim)
        self.layer_norm_first = cfg.encoder_layer_norm_first

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the block.

        Returns:
            The block's output and its feed-forward output before the residual addition, both (B, T, D).
        """
        if self.layer_norm_first:
            attended = self.attention(self.layer_norm(x), attention_mask)
            x = self._add(x, attended, into=attended)
            forwarded = self.feed_forward(self.final_layer_norm(x))
            return self._add(x, forwarded, into=x), forwarded
        attended = self.attention(x, attention_mask)
        x = self._add(x, attended, self.layer_norm, into=attended)
        forwarded = self.feed_forward(x)
        return self._add(x, forwarded, self.final_layer_norm, into=x), forwarded

    def _add(self, x: Tensor, y: Tensor, norm: nn.Module | None = None, *, into: Tensor) -> Tensor:
        """The residual connection, in the place of ``into`` where that saves memory."""

        def add(x: Tensor, y: Tensor) -> Tensor:
            x = x + self.dropout(y)
            return x if norm is None else norm(x)

        return _piecewise(add, x, y, into=into) if _in_pieces(x.shape[1]) else add(x, y)


class Transformer(nn.Module):
    """Positional convolutions, then ``cfg.encoder_num_layers`` blocks.

    Attention masks are boolean, True where to attend, broadcastable to (B, 1, T, T); the first query row says which
    frames exist. None means that all do.
    """

    def __init__(self, cfg: DinoSRConfig) -> None:
        super().__init__()
        dim = cfg.encoder_embed_dim
        self.pos_conv_embed = PositionalConvolution(
            dim, cfg.encoder_pos_conv_kernel, cfg.encoder_pos_conv_groups, cfg.encoder_pos_conv_depth
        )
        self.layer_norm = nn.LayerNorm(dim)
        self.dropout = Dropout(cfg.encoder_dropout)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.encoder_num_layers))
        self.layer_norm_first = cfg.encoder_layer_norm_first
        self.layer_drop = cfg.encoder_layer_drop

    def _run(
        self, x: Tensor, attention_mask: Tensor | None, kept: range, *, before_residual: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the blocks up to the last of ``kept``: the residual stream after them, and the outputs of those kept."""
        frame_mask = None
        if attention_mask is not None:
            frame_mask = attention_mask[..., 0, :].expand(x.shape[0], 1, x.shape[1]).transpose(1, 2)
        x = x + self.pos_conv_embed(x, frame_mask)
        if not self.layer_norm_first:
            x = self.layer_norm(x)
        x = self.dropout(x)
        outputs = []
        for i, layer in enumerate(self.layers[: kept.stop]):
            output, forwarded = layer(x, attention_mask)
            if i >= kept.start:
                outputs.append(forwarded if before_residual else output)
            if self.training and self.layer_drop > 0:
                # Drawn on the device and computed either way: no synchronisation, and a dropped block's parameters
                # get the zero gradient that distributed training waits for.
                output = torch.where(torch.rand((), device=x.device) < self.layer_drop, x, output)
            x = output
        return x, outputs

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode projected features.

        Args:
            x: (B, T, D).
            attention_mask: See the class.

        Returns:
            The final output, (B, T, D): the last block's, after the final LayerNorm in the pre-norm model.
        """
        num_layers = len(self.layers)
        x, _ = self._run(x, attention_mask, range(num_layers, num_layers))
        return self.layer_norm(x) if self.layer_norm_first else x

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
            attention_mask: See the class.
            num_layers: How many blocks to run.
            before_residual: Give each block's feed-forward output before the residual addition, as the heads and the
                teacher's targets use it, instead of the block's full output.
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

"""Waveform to frames: the convolutional feature extractor and the projection to the transformer's width."""

from collections.abc import Sequence
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spidr.models.convolutions import can_extract, conv_shapes, valid_rows
from spidr.models.kernels import known, through
from spidr.models.long import extract_in_parts
from spidr.tools.errors import InputError
from spidr.tools.frames import conv_length


@known
class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, T)."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@known
class GroupNorm(nn.GroupNorm):
    """GroupNorm with one group per channel of (B, C, T), over the frames that exist."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, num_channels)

    def forward(self, x: Tensor, exists: Tensor | None = None) -> Tensor:
        """(B, C, T) to the same; ``exists`` (B, T) is False where a frame does not count in the statistics."""
        if exists is None:
            exists = x.new_ones(x.shape[0], x.shape[2], dtype=torch.bool)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        counts = exists.unsqueeze(1).to(wide.dtype)
        count = counts.sum(2, keepdim=True).clamp(min=1)
        centred = wide - (wide * counts).sum(2, keepdim=True) / count
        var = (centred.square() * counts).sum(2, keepdim=True) / count
        scale = torch.rsqrt(var + self.eps) * self.weight.unsqueeze(1)
        return torch.addcmul(self.bias.unsqueeze(1), centred, scale).to(x.dtype)


@known
class ConvLayerBlock(nn.Module):
    """A convolution without padding, its norm if any, and GELU."""

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
        """Draw a new kernel: Kaiming normal."""
        nn.init.kaiming_normal_(self.conv.weight)

    def forward(self, x: Tensor, exists: Tensor | None = None) -> Tensor:
        """(B, C, T) to (B, C', T'); ``exists`` (B, T') is for a :class:`GroupNorm`."""
        x = self.conv(x)
        if self.layer_norm is not None:
            x = self.layer_norm(x) if exists is None else self.layer_norm(x, exists)
        return F.gelu(x)


@known
class FeatureExtractor(nn.Module):
    """A stack of convolution blocks.

    Args:
        conv_layers: The blocks. Those of ours that nobody touched are computed by ``convolutions.extract``.
    """

    def __init__(self, conv_layers: nn.ModuleList) -> None:
        super().__init__()
        self.conv_layers = conv_layers
        self._built = conv_shapes(cast("nn.Conv1d", layer.conv) for layer in conv_layers)

    @classmethod
    def build(cls, mode: str, shapes: Sequence[tuple[int, int, int]], *, bias: bool) -> Self:
        """A new extractor.

        Args:
            mode: "layer_norm": LayerNorm over channels after every convolution; "group_norm": GroupNorm with one group
                per channel after the first only.
            shapes: (out_channels, kernel, stride) of each convolution.
            bias: Whether the convolutions have a bias.
        """
        layers, in_channels = nn.ModuleList(), 1
        for channels, kernel, stride in shapes:
            norm: nn.Module | None = None
            if mode == "layer_norm":
                norm = LayerNorm(channels)
            elif not layers:
                norm = GroupNorm(channels)
            layers.append(ConvLayerBlock(in_channels, channels, kernel, stride, norm, bias=bias))
            in_channels = channels
        return cls(layers)

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(out_channels, kernel, stride) of each convolution, as they are now."""
        convs = [getattr(layer, "conv", None) for layer in self.conv_layers]
        return [
            conv_shapes([conv])[0] if isinstance(conv, nn.Conv1d) else self._built[i] for i, conv in enumerate(convs)
        ]

    @property
    def has_group_norm(self) -> bool:
        """Whether frames depend on the whole of their utterance."""
        return any(isinstance(module, nn.GroupNorm) for module in self.modules())

    def num_frames(self, num_samples: int) -> int:
        """Frames that ``num_samples`` samples give."""
        return conv_length(self.shapes, num_samples)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Turn waveforms into frames.

        Args:
            waveforms: (B, S) float.
            lengths: Samples that count in each row, (B,). They matter to a group norm only, which otherwise takes its
                statistics over the padding too.

        Returns:
            (B, T, C) with T the number of frames of S samples.

        Raises:
            InputError: If S samples do not fill one frame.
        """
        batch, samples = waveforms.shape
        if batch == 0:
            raise InputError("a batch of waveforms must have at least one row")
        if self.num_frames(samples) < 1:
            raise InputError(f"waveforms of {samples} samples are too short: they do not fill one frame")
        layers = list(self.conv_layers)
        if can_extract(layers):
            return extract_in_parts(layers, waveforms, lengths)
        x, exists = waveforms.unsqueeze(1), None
        if lengths is not None and self.has_group_norm:
            if type(layers[0]) is not ConvLayerBlock or type(layers[0].layer_norm) is not GroupNorm:
                return self._one_by_one(waveforms, lengths)
            shape = self.shapes[0]
            exists = valid_rows(lengths, shape, conv_length([shape], samples))
        x = layers[0](x) if exists is None else layers[0](x, exists)
        for layer in layers[1:]:
            x = layer(x)
        return x.transpose(1, 2)

    def _one_by_one(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Each utterance without its padding, which a norm that is not ours would take into its statistics."""
        frames = self.num_frames(waveforms.shape[1])
        rows = [self(waveforms[i : i + 1, :length]) for i, length in enumerate(lengths.tolist())]
        return torch.cat([F.pad(row, (0, 0, 0, frames - row.shape[1])) for row in rows])


class FeatureProjection(nn.Module):
    """LayerNorm over the extractor's channels, then a linear map to the transformer's width."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(in_features)
        self.projection = nn.Linear(in_features, out_features)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, C) to (B, T, D)."""
        return through(self.projection, self.layer_norm(frames))

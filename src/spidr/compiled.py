"""The training forward through ``torch.compile``, such that a run that was stopped goes on with the same code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spidr.config import Config
from spidr.models import DinoSR


class Compiled:
    """A model's forward, compiled. What comes out for a batch does not depend on the batches before it.

    One code serves all sizes, but the compiler fits it to those that it sees first: how a sum is split, and with it the
    last bit, would depend on the batch at which a run happens to start. So it first sees a made-up batch, of the
    largest size, and does so for every kind of batch that needs a code of its own: with and without padding, and where
    a size is 0 or 1.

    Args:
        model: The model.
        cfg: Says how large batches may be.
    """

    def __init__(self, model: DinoSR, cfg: Config) -> None:
        self._model = model
        self._samples = cfg.data.max_sample_size
        self._batch = max(2, cfg.data.max_batch_length // cfg.data.max_sample_size)
        _leave_convolutions_dynamic()
        self._call = torch.compile(model, dynamic=True)
        self._known: set[tuple[Any, ...]] = set()

    def __call__(self, waveforms: Tensor, **options: Tensor | None) -> Any:
        """Call the model."""
        kind = (min(2, len(waveforms)), *((name, _kind(value)) for name, value in options.items()))
        if kind not in self._known:
            self._known.add(kind)
            self._compile_for(waveforms, options)
        return self._call(waveforms, **options)

    def _compile_for(self, waveforms: Tensor, options: dict[str, Tensor | None]) -> None:
        """Run a made-up batch of the same kind; nothing is left of it."""
        batch = self._batch if len(waveforms) > 1 else 1
        frames = self._model.feature_extractor.num_frames(self._samples)
        mask = options.get("mask")
        count = frames // 2 if mask is None or mask.shape[1] > 1 else mask.shape[1]
        made_up = {
            "mask": torch.arange(count, device=waveforms.device).repeat(batch, 1),
            "attention_mask": waveforms.new_ones(batch, 1, 1, frames, dtype=torch.bool),
            "lengths": torch.full((batch,), self._samples, device=waveforms.device),
            "channel_mask": waveforms.new_zeros(batch, self._model.cfg.encoder_embed_dim, dtype=torch.bool),
        }
        inputs = {name: None if value is None else made_up[name] for name, value in options.items()}
        gathered = self._model.statistics.flat.clone()
        devices = [waveforms.device] if waveforms.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            self._call(waveforms.new_zeros(batch, self._samples), **inputs)
        self._model.statistics.flat.copy_(gathered)


def _kind(value: Tensor | None) -> tuple[int, ...] | None:
    """Which sizes the compiler tells apart: 0, 1 and more."""
    return None if value is None else tuple(min(2, size) for size in value.shape)


def _leave_convolutions_dynamic() -> None:
    """Have the gradient of a convolution computed by ATen, as the compiler decides anyway, but for any length.

    To come to that decision, torch 2.14 fixes the length of the input, and would compile anew for every other one.
    """
    try:
        from torch._inductor.kernel.conv import aten_convolution_backward_fallback
        from torch._inductor.lowering import lowerings
    except ImportError:  # other versions
        return
    lowerings[torch.ops.aten.convolution_backward.default] = aten_convolution_backward_fallback

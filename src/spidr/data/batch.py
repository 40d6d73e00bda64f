"""Batches and how they are made from recordings."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spidr.config import DataConfig, MaskingConfig
from spidr.data.audio import read_audio, seekable_length, standardize, statistics, statistics_of
from spidr.data.masks import MaskGenerator
from spidr.data.recording import Recording
from spidr.data.seeds import Draw, generator
from spidr.tools.errors import InputError
from spidr.tools.frames import conv_length, samples_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Waveforms and their masks. Unpacks as ``waveforms, attention_mask, mask``."""

    waveforms: Tensor  # float32 (B, S), zero where padded
    rows: Tensor  # int64 (B,), rows of the manifest
    starts: Tensor  # int64 (B,), the sample of the recording at which each waveform begins
    num_samples: int  # total, without padding
    num_frames: int  # total that the model makes of them, without padding
    max_frames: int  # T, the frames of the longest row
    lengths: Tensor | None = None  # int64 (B,), samples of each waveform; None when nothing is padded
    frame_lengths: Tensor | None = None  # int64 (B,), frames of each waveform; None when nothing is padded
    mask: Tensor | None = None  # bool (B, T), True for masked frames, M in each row; None without masking
    mask_indices: Tensor | None = None  # int64 (B, M), the masked frames of each row, ascending; None without masking
    channel_mask: Tensor | None = None  # bool (B, D), True for feature channels to set to zero; None without masking
    skipped: dict[str, str] = field(default_factory=dict)  # unreadable files, replaced by other rows, and why

    @property
    def attention_mask(self) -> Tensor | None:
        """Bool (B, 1, 1, T), True for frames that exist; None when nothing is padded."""
        if self.frame_lengths is None:
            return None
        frames = torch.arange(self.max_frames, device=self.frame_lengths.device)
        return (frames < self.frame_lengths[:, None])[:, None, None, :]

    @property
    def options(self) -> dict[str, Tensor | None]:
        """Keyword arguments for the model's ``forward`` besides the waveforms."""
        return {
            "mask": self.mask_indices,
            "attention_mask": self.attention_mask,
            "lengths": self.lengths,
            "channel_mask": self.channel_mask,
        }

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter((self.waveforms, self.attention_mask, self.mask))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The batch on another device. From pinned memory, ``non_blocking`` copies while the caller continues."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The attributes that are tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors.items()})  # type: ignore[arg-type]


class Uploader:
    """Copies batches to a device; on a GPU, while it is still busy with the previous step.

    Pinned batches are copied on a separate stream: computations with them wait for the copy, which waits for nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device."""
        if self._stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self._stream):
            copy = batch.to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        for tensor in copy.tensors.values():
            tensor.record_stream(computing)  # or its memory could be reused for the next copy too early
        return copy


class PackedBatch:
    """A batch sent between processes as bytes, since tensors would need shared memory and sockets."""

    def __init__(self, batch: Batch) -> None:
        self._values = vars(batch) | {name: tensor.numpy() for name, tensor in batch.tensors.items()}

    def open(self) -> Batch:
        """The batch."""
        values: Any = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in self._values.items()}
        return Batch(**values)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by torch's loader."""
        return self.open().pin_memory()


class BatchRequest(NamedTuple):
    """All that a worker needs to make a batch, so that it holds no manifest."""

    rows: NDArray[np.integer[Any]]  # of the manifest (B,)
    lengths: NDArray[np.integer[Any]]  # according to the manifest (B,)
    recordings: list[Recording]
    seed: int
    key: tuple[int, int] | None  # (epoch, number of the batch) to seed the batch's draws; None: seed by row
    again: tuple[int, int] | None = None  # the same for the masks of a repeated batch

    def generators(self, key: tuple[int, int] | None) -> list[np.random.Generator]:
        """One generator for the batch, or one per row."""
        if key is not None:
            return [generator(self.seed, Draw.BATCH, *key)]
        return [generator(self.seed, Draw.ROW, int(row)) for row in self.rows]


@cache  # once
def _warn_of_wrong_lengths(manifest: str) -> None:
    text = "recordings are longer than it says; they are cropped to keep batches within data.max_batch_length"
    logger.warning("%s: %s. Write the manifest again.", manifest, text)


# A long recording is decoded whole for its statistics only once per process.
_remembered_statistics = lru_cache(maxsize=1 << 16)(statistics)


class Loaded(NamedTuple):
    """A recording: its length and, unless it is long, its samples."""

    recording: Recording
    length: int
    samples: NDArray[np.float32] | None
    moments: tuple[float, float] | None

    def write(self, start: int, out: NDArray[np.float32]) -> None:
        """Write the samples from ``start`` on to ``out``, standardised if so configured."""
        stop = start + len(out)
        samples = read_audio(self.recording, start, stop) if self.samples is None else self.samples[start:stop]
        if self.moments is None:
            out[:] = samples
        else:
            standardize(samples, *self.moments, out=out)


class UnreadableBatchError(InputError):
    """With ``on_error = "skip"``, no recording of a batch can be read; ``skipped`` says why."""

    def __init__(self, skipped: dict[str, str]) -> None:
        super().__init__(f"No recording of a batch can be read. {next(iter(skipped.values()))}")
        self.skipped = skipped

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.skipped,)


class Collator:
    """Makes batches: reads, standardises, crops, pads and masks (if ``masking`` is not None).

    ``cfg.min_sample_size`` must give at least one frame of the extractor; ``channels`` is needed to mask channels.
    """

    def __init__(
        self,
        cfg: DataConfig,
        masking: MaskingConfig | None,
        conv_layer_config: Sequence[tuple[int, int, int]],
        channels: int | None,
    ) -> None:
        self.cfg, self.conv_layer_config, self.channels = cfg, list(conv_layer_config), channels
        self.masks = None if masking is None else MaskGenerator(masking)
        if self.masks is not None and self.masks.masks_channels and channels is None:
            raise InputError("mask_channel_prob is above 0: the number of channels is needed (`channels=`).")

    def __call__(self, request: BatchRequest) -> Batch:
        """Make a batch, a function of the request and the recordings only.

        Raises:
            InputError: A recording is unreadable or too short; with ``on_error = "skip"``, all are.
        """
        rows = request.rows.astype(np.int64)
        skipped: dict[str, str] = {}
        loaded: list[Loaded | None] = [None] * len(rows)
        for i, (recording, length) in enumerate(zip(request.recordings, request.lengths, strict=True)):
            with self._skipping(recording, skipped):
                loaded[i] = self.load(recording, int(length))

        rngs = request.generators(request.key)
        known = [item.length for item in loaded if item is not None]
        available = np.array([min(known, default=1) if item is None else item.length for item in loaded])
        lengths, width = self._lengths(available, request.lengths)
        starts = np.zeros_like(lengths)
        if self.cfg.rand_crop:
            shares = np.concatenate([rng.random(len(rows) // len(rngs)) for rng in rngs])
            starts = (shares * (available - lengths + 1)).astype(np.int64)

        waveforms = np.empty((len(rows), width), dtype=np.float32)
        good = []
        for i, item in enumerate(loaded):
            if item is not None:
                with self._skipping(item.recording, skipped):
                    item.write(int(starts[i]), waveforms[i, : lengths[i]])
                    waveforms[i, lengths[i] :] = 0
                    good.append(i)
        if not good:
            raise UnreadableBatchError(skipped)
        if skipped:
            # Readable recordings replace, in turn, unreadable ones, so that the batch keeps its size.
            chosen = [i if i in good else good[i % len(good)] for i in range(len(rows))]
            waveforms, rows, starts, lengths = waveforms[chosen], rows[chosen], starts[chosen], lengths[chosen]

        frames = conv_length(self.conv_layer_config, lengths)
        padded = bool((lengths != width).any())
        batch = Batch(
            torch.from_numpy(waveforms),
            rows=torch.from_numpy(rows),
            starts=torch.from_numpy(starts),
            num_samples=int(lengths.sum()),
            num_frames=int(frames.sum()),
            max_frames=int(conv_length(self.conv_layer_config, width)),
            lengths=torch.from_numpy(lengths) if padded else None,
            frame_lengths=torch.from_numpy(frames) if padded else None,
            skipped=skipped,
        )
        if self.masks is None:
            return batch
        return self._mask(batch, frames, rngs if request.again is None else request.generators(request.again))

    def _lengths(
        self, available: NDArray[np.int64], promised: NDArray[np.integer[Any]]
    ) -> tuple[NDArray[np.int64], int]:
        """Samples to take of each recording (B,), and samples per row; ``promised`` are the manifest's lengths."""
        cfg, shapes = self.cfg, self.conv_layer_config
        lengths = np.minimum(available, cfg.max_sample_size)
        # Lengths written by spidr 0.1.2 are off by at most one sample.
        if lengths.sum() > max(cfg.max_batch_length, np.minimum(promised, cfg.max_sample_size).sum()) + len(lengths):
            _warn_of_wrong_lengths(str(cfg.manifest))
            lengths = np.minimum(lengths, np.maximum(promised, cfg.min_sample_size))
        if not cfg.enable_padding:
            lengths[:] = lengths.min()
        width = int(lengths.max())
        frames = int(conv_length(shapes, width))
        if excess := frames % cfg.length_multiple:
            if cfg.enable_padding:
                width = samples_of(shapes, frames - excess + cfg.length_multiple)
            elif frames > excess:
                width = samples_of(shapes, frames - excess)
                lengths[:] = width
        return lengths, width

    @contextmanager
    def _skipping(self, recording: Recording, skipped: dict[str, str]) -> Iterator[None]:
        """With ``on_error = "skip"``, record an unreadable recording instead of raising."""
        try:
            yield
        except InputError as error:
            if self.cfg.on_error == "raise":
                raise
            skipped[str(recording)] = str(error)

    def _mask(self, batch: Batch, frames: NDArray[np.int64], rngs: list[np.random.Generator]) -> Batch:
        assert self.masks is not None
        channel_mask = None
        if self.masks.masks_channels and self.channels is not None:
            # Draw channels before frames, since the number of draws for frames depends on the batch.
            channel_mask = torch.from_numpy(self.masks.draw_channels(len(frames), self.channels, rngs))
        indices = torch.from_numpy(self.masks.frames.draw(frames, rngs))
        mask = torch.zeros(len(frames), batch.max_frames, dtype=torch.bool).scatter_(1, indices, value=True)
        return replace(batch, mask=mask, mask_indices=indices, channel_mask=channel_mask)

    def load(self, recording: Recording, length: int) -> Loaded:
        """Open a recording with the manifest's length. Raises InputError if it is unreadable or too short."""
        cfg = self.cfg
        moments = None if recording.mean is None or recording.std is None else (recording.mean, recording.std)
        if length > cfg.max_sample_size and (seekable := seekable_length(recording)) is not None:
            samples, length = None, seekable  # Only the needed part will be read.
            moments = (moments or _remembered_statistics(recording)) if cfg.normalize else None
        else:
            samples = read_audio(recording)
            length = len(samples)
            moments = (moments or statistics_of(samples)) if cfg.normalize else None
        if length < cfg.min_sample_size:
            shorter = f"{length} samples, fewer than min_sample_size ({cfg.min_sample_size}) and than the manifest says"
            raise InputError(f"{recording}: {shorter}; write the manifest again.")
        return Loaded(recording, length, samples, moments)

"""Datasets, samplers and the collator of ``spidr.data.dataset``, to build a ``torch.utils.data.DataLoader`` from."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, Sampler

from spidr.config import DataConfig
from spidr.data.dataset import SpeechDataset
from spidr.data.loader import place
from spidr.data.masks import MaskGenerator
from spidr.data.sampler import bucket_boundaries, pack, usable_rows
from spidr.data.seeds import Draw, generator
from spidr.tools.errors import InputError
from spidr.tools.frames import conv_length

__all__ = [
    *("BucketizeBatchSampler", "DistributedBatchSampler"),
    *("SpeechCollatorWithMasking", "SpeechDatasetFromArchive", "SpeechDatasetFromFiles"),
]


class SpeechDatasetFromFiles(SpeechDataset):
    """Recordings in files."""


class SpeechDatasetFromArchive(SpeechDataset):
    """Recordings inside tar archives."""


class SpeechCollatorWithMasking:
    """Makes a batch of waveforms (S,): pads them to the longest or crops them to the shortest, and draws masks.

    Waveforms are cut to ``max_sample_size``; torch's default generator is the source of randomness.
    """

    def __init__(
        self,
        mask_generator: MaskGenerator,
        *,
        max_sample_size: int,
        conv_layer_config: list[tuple[int, int, int]],
        enable_padding: bool,
        rand_crop: bool,
    ) -> None:
        self.mask_generator, self.conv_layer_config = mask_generator, conv_layer_config
        self.max_sample_size, self.enable_padding, self.rand_crop = max_sample_size, enable_padding, rand_crop

    def __call__(self, batch: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Waveforms (B, S), attention mask (B, 1, 1, T) or None if nothing is padded, and mask (B, T)."""
        sizes = [len(waveform) for waveform in batch]
        size = min(max(sizes) if self.enable_padding else min(sizes), self.max_sample_size)
        waveforms = []
        for waveform in batch:
            spare = max(0, len(waveform) - size)
            start = int(torch.randint(spare + 1, ())) if self.rand_crop else 0
            waveforms.append(waveform[start : start + size])
        frames = conv_length(self.conv_layer_config, torch.tensor([len(waveform) for waveform in waveforms]))
        exists = torch.arange(int(frames.max())) < frames[:, None]
        mask, _ = self.mask_generator(~exists)
        return pad_sequence(waveforms, batch_first=True), None if exists.all() else exists[:, None, None], mask


class BucketizeBatchSampler(BatchSampler):
    """Batches of rows of similar length: (seed, epoch) decide which, and in which order.

    Rows shorter than ``min_len`` are skipped, longer ones count as ``max_len``. They are shuffled within
    ``num_buckets`` buckets of equal range ("uniform") or with equally many rows ("percentile"). A batch has
    ``batch_size`` rows, or lengths that add up to at most ``max_token_count``. Without ``shuffle``, rows go from
    shortest to longest. ``drop_last`` drops a last batch of fewer than
    ``batch_size`` rows. ``iter_list`` are the batches of this epoch.
    """

    def __init__(
        self,
        *,
        lengths: Sequence[int],
        num_buckets: int,
        min_len: int,
        max_len: int | None,
        max_token_count: int | None,
        batch_size: int | None,
        seed: int,
        bucket_method: Literal["uniform", "percentile"],
        shuffle: bool,
        drop_last: bool,
    ) -> None:
        if (max_token_count is None) == (batch_size is None):
            raise InputError("exactly one of max_token_count and batch_size must be set")
        longest = max(lengths, default=1) if max_len is None else max_len
        sizes = {"min_sample_size": min_len, "max_sample_size": longest, "max_batch_length": max_token_count or longest}
        cfg = DataConfig("lengths", num_buckets=num_buckets, bucket_method=bucket_method, **sizes)  # type: ignore[arg-type]
        self._rows, self._lengths = usable_rows(np.asarray(lengths), cfg)
        self._bucket = np.searchsorted(bucket_boundaries(self._lengths, cfg), self._lengths)
        self.max_token_count, self.seed, self.shuffle = max_token_count, seed, shuffle
        self.batch_size: int = batch_size  # type: ignore[assignment]  # None with max_token_count, as published
        self.drop_last = drop_last
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate over."""
        order = np.argsort(self._lengths, kind="stable")
        rng = generator(self.seed, Draw.ORDER, epoch)
        if self.shuffle:
            order = rng.permutation(len(order))
            order = order[np.argsort(self._bucket[order], kind="stable")]
        sizes = self._lengths[order] if self.max_token_count else np.ones_like(order)
        bounds = pack(sizes, self.max_token_count or self.batch_size)
        batches = [self._rows[part].tolist() for part in np.split(order, bounds[1:-1])]
        if self.drop_last and self.batch_size and len(batches[-1]) < self.batch_size:
            batches.pop()
        self.iter_list = [batches[i] for i in rng.permutation(len(batches))] if self.shuffle else batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.iter_list)

    def __len__(self) -> int:
        return len(self.iter_list)


class DistributedBatchSampler(Sampler[list[int]]):
    """Deals the batches of a sampler to the processes of the default group, equally many to each.

    With ``drop_last``, leftover batches are dropped; otherwise the first ones are repeated.
    """

    def __init__(self, batch_sampler: BucketizeBatchSampler, *, seed: int, shuffle: bool, drop_last: bool) -> None:
        self.batch_sampler = batch_sampler
        self.rank, self.num_replicas = place()
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self._deal(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate over, also for the inner sampler."""
        self.batch_sampler.set_epoch(epoch)
        self._deal(epoch)

    def _deal(self, epoch: int) -> None:
        self.epoch, batches = epoch, list(self.batch_sampler)
        order: Any = np.arange(len(batches))
        if self.shuffle:
            order = generator(self.seed, Draw.ORDER, epoch, 1).permutation(len(batches))
        total = len(batches) // self.num_replicas if self.drop_last else -(-len(batches) // self.num_replicas)
        self.num_samples, self.total_size = total, total * self.num_replicas
        self.subset = [batches[i] for i in np.resize(order, self.total_size)[self.rank :: self.num_replicas]]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.subset)

    def __len__(self) -> int:
        return self.num_samples

"""Samplers, datasets and collator do what the published package's tests promise."""

import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import soundfile
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import BatchSampler, DataLoader

from spidr.config import DEFAULT_CONV_LAYER_CONFIG, MaskingConfig
from spidr.data.dataset import (
    BucketizeBatchSampler,
    DistributedBatchSampler,
    SpeechCollatorWithMasking,
    SpeechDatasetFromFiles,
    conv_length,
)
from spidr.data.masks import MaskGenerator

LENGTHS = [random.Random(0).randint(500, 40_000) for _ in range(200)]


def sampler(**changes: Any) -> BucketizeBatchSampler:
    settings: dict[str, Any] = {
        "lengths": LENGTHS, "num_buckets": 5, "min_len": 2000, "max_len": 30_000, "max_token_count": 90_000,
        "batch_size": None, "seed": 0, "bucket_method": "uniform", "shuffle": True, "drop_last": False,
    }  # fmt: skip
    return BucketizeBatchSampler(**settings | changes)


@pytest.mark.parametrize("method", ["uniform", "percentile"])
@pytest.mark.parametrize("limit", [{}, {"max_len": None}, {"max_token_count": None, "batch_size": 7}])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_hold_each_row_that_is_long_enough_once(method: str, limit: dict[str, Any], *, shuffle: bool) -> None:
    batches = list(sampler(bucket_method=method, shuffle=shuffle, **limit))
    assert sorted(row for batch in batches for row in batch) == [i for i, n in enumerate(LENGTHS) if n >= 2000]
    cap = 30_000 if limit.get("max_len", 30_000) else 10**6
    if "batch_size" in limit:
        assert sum(len(batch) == 7 for batch in batches) >= len(batches) - 1
    else:
        assert max(sum(min(LENGTHS[row], cap) for row in batch) for batch in batches) <= 90_000
    if not shuffle:
        capped = [min(LENGTHS[row], cap) for batch in batches for row in batch]
        assert capped == sorted(capped)


def test_an_epoch_does_not_depend_on_those_before() -> None:
    one, other = sampler(), sampler()
    assert isinstance(one, BatchSampler)
    one.set_epoch(3)
    for epoch in (1, 5, 3):
        other.set_epoch(epoch)
    assert list(one) == list(other) == one.iter_list
    assert len(one) == len(one.iter_list)
    other.set_epoch(4)
    assert list(one) != list(other)


def test_an_incomplete_last_batch_is_dropped_on_request() -> None:
    size = {"max_token_count": None, "batch_size": 7, "shuffle": False}
    assert [len(batch) for batch in sampler(**size)][-1] < 7
    assert {len(batch) for batch in sampler(drop_last=True, **size)} == {7}


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 3}, {"max_token_count": None}, {"max_len": 100}, {"max_token_count": 10_000}]
)
def test_contradictory_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        sampler(**wrong)


def dealt(inner: BucketizeBatchSampler, ranks: int, **options: Any) -> list[DistributedBatchSampler]:
    found = []
    for rank in range(ranks):
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        found.append(DistributedBatchSampler(inner, seed=0, **options))
        dist.destroy_process_group()
    return found


@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_all_batches_equally_without_changing_the_sampler(*, drop_last: bool) -> None:
    inner = sampler()
    inner.set_epoch(2)
    before = [list(batch) for batch in inner]
    parts = dealt(inner, 3, shuffle=True, drop_last=drop_last)
    assert [(part.rank, part.num_replicas) for part in parts] == [(0, 3), (1, 3), (2, 3)]
    assert len({len(part) for part in parts}) == 1
    given = [tuple(batch) for part in parts for batch in part]
    everything = set(map(tuple, before))
    assert set(given) == everything if not drop_last else set(given) < everything and len(set(given)) == len(given)
    assert list(inner) == before
    for part in parts:
        part.set_epoch(2)
    assert len({tuple(batch) for part in parts for batch in part}) == len(set(given))


def test_one_process_without_a_group() -> None:
    alone = DistributedBatchSampler(sampler(shuffle=False), seed=0, shuffle=False, drop_last=False)
    assert list(alone) == list(sampler(shuffle=False))
    assert (alone.rank, alone.num_replicas) == (0, 1)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rows = []
    for i, length in enumerate((9000, 12_000, 20_000, 16_000)):
        samples = torch.randn(length, generator=torch.Generator().manual_seed(i)).clamp(-4, 4) / 5
        soundfile.write(tmp_path / f"{i}.wav", samples.numpy(), 16_000)
        rows.append({"fileid": str(i), "path": str(tmp_path / f"{i}.wav"), "num_samples": length, "units": [i, i + 1]})
    pl.DataFrame(rows).write_ndjson(tmp_path / "manifest.jsonl")
    return tmp_path / "manifest.jsonl"


class WithUnits(SpeechDatasetFromFiles):
    """Minimal-hubert's dataset."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index), torch.tensor(self.manifest[index, "units"])


def test_a_dataset_can_be_subclassed(manifest: Path) -> None:
    dataset = WithUnits(manifest, normalize=True)
    waveform, units = dataset[2]
    assert waveform.shape == (20_000,)
    assert waveform.mean().abs() < 1e-5
    assert units.tolist() == [2, 3]
    assert len(dataset) == dataset.manifest.height == 4


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # how torch starts workers
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_made_of_the_parts(manifest: Path, workers: int) -> None:
    dataset = SpeechDatasetFromFiles(manifest, normalize=True)
    collator = SpeechCollatorWithMasking(
        MaskGenerator(MaskingConfig()),
        max_sample_size=16_000,
        conv_layer_config=DEFAULT_CONV_LAYER_CONFIG,
        enable_padding=True,
        rand_crop=True,
    )
    batches = sampler(lengths=dataset.manifest["num_samples"].to_list(), max_len=16_000, max_token_count=60_000)
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_sampler=batches, collate_fn=collator, num_workers=workers, generator=torch.Generator()
    )
    (batch,) = loader
    waveforms, attention_mask, mask = batch
    assert waveforms.shape == (4, 16_000)
    frames = conv_length(DEFAULT_CONV_LAYER_CONFIG, torch.tensor([len(w.nonzero()) for w in waveforms]))
    assert attention_mask.shape == (4, 1, 1, 49)
    assert torch.equal(attention_mask.sum(-1).flatten(), frames)
    assert not (mask & ~attention_mask[:, 0, 0]).any()
    collator.enable_padding = False
    (batch,) = loader if workers == 0 else DataLoader(dataset, batch_sampler=batches, collate_fn=collator)
    waveforms, attention_mask, mask = batch
    assert (waveforms.shape, attention_mask, mask.shape) == ((4, 9000), None, (4, 27))


def test_masks_are_repeatable_ascending_and_never_in_the_padding() -> None:
    generator = MaskGenerator(MaskingConfig())
    padding = torch.arange(50) >= torch.tensor([[50], [31], [12]])
    first, second = (generator(padding, generator=torch.Generator().manual_seed(1))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not (first & padding).any()
    assert len(set(first.sum(1).tolist())) == 1

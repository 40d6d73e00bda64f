"""The order of batches, against a slow oracle and stated properties."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from spidr.config import DataConfig
from spidr.data.sampler import BatchList, BatchSampler, bucket_boundaries, pack, sorted_batches
from spidr.tools.errors import InputError

CFG = DataConfig("m.csv", min_sample_size=20, max_sample_size=100, max_batch_length=300, num_buckets=7)

lengths_and_cfg = st.tuples(
    st.lists(st.integers(0, 200), min_size=1, max_size=150).filter(lambda lengths: max(lengths) >= 20).map(np.array),
    st.builds(
        replace,
        st.just(CFG),
        max_batch_length=st.integers(100, 1000),
        num_buckets=st.integers(1, 20),
        bucket_method=st.sampled_from(["uniform", "percentile"]),
        random_seed=st.integers(0, 2**40),
    ),
)


def as_lists(batches: BatchList) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def oracle_pack(lengths: list[int], limit: int) -> list[int]:
    bounds, total = [0], 0
    for i, length in enumerate(lengths):
        if total + length > limit:
            bounds.append(i)
            total = 0
        total += length
    return [*bounds, len(lengths)]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=200), st.integers(100, 500))
def test_pack_fills_batches_one_after_the_other(lengths: list[int], limit: int) -> None:
    assert pack(np.array(lengths), limit).tolist() == oracle_pack(lengths, limit)


@given(lengths_and_cfg, st.integers(0, 3), st.integers(1, 4), st.integers(1, 4))
@settings(deadline=None)
def test_properties_of_an_epoch(
    case: tuple[np.ndarray, DataConfig], epoch: int, world_size: int, accumulation: int
) -> None:
    lengths, cfg = case
    usable = np.flatnonzero(lengths >= 20).tolist()
    alone = as_lists(BatchSampler(lengths, cfg).epoch(epoch))
    assert sorted(row for batch in alone for row in batch) == usable
    for batch in alone:
        assert np.minimum(lengths[batch], 100).sum() <= cfg.max_batch_length
    sampler = BatchSampler(lengths, cfg, world_size=world_size, accumulation=accumulation)
    round_size = world_size * accumulation
    if len(alone) < world_size:
        with pytest.raises(InputError, match=f"{len(alone)} batches for {world_size} processes"):
            sampler.epoch(epoch)
        return
    batches = as_lists(sampler.epoch(epoch))
    # The same list, then as few of its batches as complete the last round.
    assert len(batches) == -(-len(alone) // round_size) * round_size
    assert batches == [alone[i % len(alone)] for i in range(len(batches))]
    # The same list for any number of processes.
    assert batches == as_lists(BatchSampler(lengths, cfg, world_size=1, accumulation=round_size).epoch(epoch))
    dropping = BatchSampler(lengths, replace(cfg, drop_last=True), world_size=world_size, accumulation=accumulation)
    if len(alone) < round_size:
        with pytest.raises(InputError, match="do not fill one step"):
            dropping.epoch(epoch)
    else:
        assert as_lists(dropping.epoch(epoch)) == alone[: len(alone) // round_size * round_size]


@given(lengths_and_cfg)
@settings(deadline=None)
def test_batches_come_from_buckets_in_order(case: tuple[np.ndarray, DataConfig]) -> None:
    lengths, cfg = case
    batches = BatchSampler(lengths, cfg).epoch(0)
    capped = np.minimum(lengths, 100)
    boundaries = bucket_boundaries(capped[lengths >= 20], cfg)
    assert len(boundaries) == cfg.num_buckets + 1
    bucket = [sum(length > boundary for boundary in boundaries) for length in capped[batches.rows]]
    assert bucket == sorted(bucket)
    assert batches.bounds.tolist() == oracle_pack(capped[batches.rows].tolist(), cfg.max_batch_length)
    assert sorted(batches.order.tolist()) == list(range(len(batches.bounds) - 1))


def test_boundaries() -> None:
    assert bucket_boundaries(np.array([50]), replace(CFG, num_buckets=2)).tolist() == [19, 60, 101]
    lengths = np.array([30, 90, 50, 70, 60])
    percentile = bucket_boundaries(lengths, replace(CFG, num_buckets=8, bucket_method="percentile"))
    np.testing.assert_allclose(percentile, np.quantile(lengths, np.linspace(0, 1, 9)))


def test_a_function_of_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(20, 100, 500)
    sampler = BatchSampler(lengths, CFG)
    first = as_lists(sampler.epoch(0))
    assert as_lists(sampler.epoch(1)) != first
    assert as_lists(sampler.epoch(0)) == first
    assert as_lists(BatchSampler(lengths, replace(CFG, random_seed=1)).epoch(0)) != first
    # Within an epoch, neither a bucket's rows nor the batches keep the manifest's order.
    one_bucket = BatchSampler(np.full(500, 100), CFG).epoch(0)
    assert one_bucket.rows.tolist() != list(range(500))
    assert one_bucket.order.tolist() != list(range(len(one_bucket)))


def test_every_place_is_equally_likely() -> None:
    """Chi-square of a recording's position within its bucket, over many epochs."""
    sampler = BatchSampler(np.full(8, 100), CFG)
    places = [sampler.epoch(epoch).rows.tolist().index(0) for epoch in range(2000)]
    counts = np.bincount(places, minlength=8)
    assert ((counts - 250) ** 2 / 250).sum() < 24.3  # 99.9 % quantile with 7 degrees of freedom


def test_batch_list() -> None:
    batches = BatchList(np.array([5, 3, 1, 4]), np.array([0, 1, 4]), np.array([1, 0, 1]))
    assert as_lists(batches) == [[3, 1, 4], [5], [3, 1, 4]]
    assert batches[-1].tolist() == [3, 1, 4]
    with pytest.raises(IndexError):
        batches[3]


@given(lengths_and_cfg)
@settings(deadline=None)
def test_sorted_batches(case: tuple[np.ndarray, DataConfig]) -> None:
    lengths, cfg = case
    rows = [row for batch in sorted_batches(lengths, cfg) for row in batch.tolist()]
    assert rows == sorted(np.flatnonzero(lengths >= 20).tolist(), key=lambda row: (min(lengths[row], 100), row))
    assert all(np.minimum(lengths[b], 100).sum() <= cfg.max_batch_length for b in sorted_batches(lengths, cfg))


def test_nothing_is_long_enough() -> None:
    with pytest.raises(
        InputError, match=r"m.csv: no recording has 20 samples \(min_sample_size is 20\); the longest of 2 has 9"
    ):
        BatchSampler(np.array([3, 9]), CFG)


def test_memory_is_arrays() -> None:
    """A million rows take a few arrays, not an object per recording."""
    import tracemalloc

    lengths = np.random.default_rng(0).integers(16_000, 280_000, 1_000_000)
    tracemalloc.start()
    try:
        sampler = BatchSampler(lengths, DataConfig("m.csv"))
        batches = sampler.epoch(0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(batches) > 30_000
    assert peak < 80e6

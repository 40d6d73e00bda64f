"""Masks against slow oracles written span by span."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from spidr.config import MaskingConfig
from spidr.data.masks import MaskGenerator, Spans

STRATEGIES = [
    Spans(0.8, "static", 0.0, 10, no_overlap=False, min_space=1, min_spans=2),
    Spans(0.8, "uniform", 3.0, 10, no_overlap=False, min_space=1, min_spans=2),
    Spans(0.65, "normal", 4.0, 10, no_overlap=False, min_space=1, min_spans=2),
    Spans(0.8, "poisson", 0.0, 10, no_overlap=False, min_space=1, min_spans=2),
    Spans(0.5, "static", 0.0, 10, no_overlap=True, min_space=1, min_spans=2),
    Spans(0.8, "static", 0.0, 10, no_overlap=True, min_space=3, min_spans=2),
    Spans(0.6, "uniform", 3.0, 8, no_overlap=True, min_space=0, min_spans=2),
    Spans(0.4, "normal", 4.0, 10, no_overlap=True, min_space=2, min_spans=2),
    Spans(0.8, "poisson", 0.0, 10, no_overlap=True, min_space=1, min_spans=2),
    Spans(0.1, "static", 0.0, 10, no_overlap=False, min_space=1, min_spans=0),
]


def oracle(spans: Spans, frames: int, rng: np.random.Generator) -> np.ndarray:
    """One row's mask before rows are equalised, written from the rules."""
    count = max(spans.min_spans, int(spans.prob * frames / spans.length + rng.random()))
    mask = np.zeros(frames, dtype=bool)
    if count == 0:
        return mask
    lengths = []
    for _ in range(count):
        if spans.selection == "static":
            lengths.append(spans.length)
        elif spans.selection == "uniform":
            lengths.append(int(rng.integers(spans.other, 2 * spans.length, endpoint=True)))
        elif spans.selection == "normal":
            lengths.append(max(1, round(rng.normal(spans.length, spans.other))))
        else:
            lengths.append(int(rng.poisson(rng.random() * spans.length)))
    if sum(lengths) == 0:
        lengths[0] = min(spans.length, frames - 1)
    if not spans.no_overlap:
        stop = frames - min(lengths)
        starts = rng.choice(stop if stop > count else min(count + 1, frames), min(count, frames), replace=False)
        for start, length in zip(starts, lengths, strict=False):
            mask[start : start + length] = True
        return mask
    parts = [(0, frames)]
    for length in sorted(lengths, reverse=True):
        fitting = [(start, stop) for start, stop in parts if stop - start >= length]
        if length == 0 or not fitting:
            break
        sizes = np.array([stop - start for start, stop in fitting])
        start, stop = fitting[rng.choice(len(fitting), p=sizes / sizes.sum())]
        begin = int(rng.integers(start, stop - length, endpoint=True))
        mask[begin : begin + length] = True
        parts.remove((start, stop))
        parts += [(start, begin - spans.min_space), (begin + length + spans.min_space, stop)]
    return mask


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of each run of masked frames."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(int), [0]))))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def describe(masks: np.ndarray) -> np.ndarray:
    """Per row: masked share, its square, number of runs, longest run, masked share of the first fifth."""
    stretches = [[stop - start for start, stop in runs(mask)] for mask in masks]
    share = masks.mean(1)
    fifth = masks[:, : masks.shape[1] // 5].mean(1)
    return np.stack(
        [share, share**2, [len(row) for row in stretches], [max(row, default=0) for row in stretches], fifth], axis=1
    )


@pytest.mark.parametrize(
    "spans", STRATEGIES, ids=lambda s: f"{s.selection}-{s.prob}-{'apart' if s.no_overlap else 'any'}"
)
@pytest.mark.parametrize("frames", [40, 200])
def test_like_the_oracle(spans: Spans, frames: int) -> None:
    """Means of the statistics over many draws agree within five standard errors."""
    rng = np.random.default_rng(frames)
    ours = describe(spans.draw_masks(np.full(1500, frames), frames, rng))
    theirs = describe(np.array([oracle(spans, frames, rng) for _ in range(1500)]))
    error = np.sqrt((ours.var(0) + theirs.var(0)) / 1500) + 1e-9
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 5 * error).all()


def test_share_with_the_defaults() -> None:
    """About half the frames of long utterances are masked; fewer with more rows to equalise."""
    masks = MaskGenerator(MaskingConfig())
    rng = [np.random.default_rng(0)]
    for rows, frames, expected in ((4, 999, 0.545), (12, 999, 0.53), (48, 250, 0.468)):
        shares = [masks.frames.draw(np.full(rows, frames), rng).shape[1] / frames for _ in range(200)]
        assert np.mean(shares) == pytest.approx(expected, abs=0.007)


def test_starts_are_uniform_and_distinct() -> None:
    """Spans of one frame show where spans start: chi-square over all positions but the last."""
    spans = Spans(0.3, "static", 0.0, 1, no_overlap=False, min_space=1, min_spans=2)
    masks = spans.draw_masks(np.full(4000, 51), 51, np.random.default_rng(1))
    assert set(masks.sum(1).tolist()) == {15, 16}  # floor(15.3 + u), none repeated
    counts = masks.sum(0)
    assert counts[50] == 0
    expected = counts.sum() / 50
    assert ((counts[:50] - expected) ** 2 / expected).sum() < 85.4  # 99.9 % quantile with 49 degrees of freedom


def test_number_of_spans() -> None:
    spans = Spans(0.5, "static", 0.0, 4, no_overlap=True, min_space=1, min_spans=2)
    masks = spans.draw_masks(np.full(4000, 50), 50, np.random.default_rng(2))
    counts = np.array([len(runs(mask)) for mask in masks])
    assert set(counts.tolist()) == {6, 7}  # floor(6.25 + u)
    assert (counts == 7).mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("selection", "other", "least", "most", "mean"),
    [("static", 0.0, 6, 6, 6), ("uniform", 2.0, 2, 12, 7), ("normal", 3.0, 1, 99, 6.02), ("poisson", 0.0, 1, 99, 3)],
)
def test_lengths_of_spans(selection: str, other: float, least: int, most: int, mean: float) -> None:
    """Spans that do not overlap show their lengths."""
    spans = Spans(0.03, selection, other, 6, no_overlap=True, min_space=1, min_spans=2)  # type: ignore[arg-type]
    masks = spans.draw_masks(np.full(1000, 1000), 1000, np.random.default_rng(3))
    lengths = np.array([stop - start for mask in masks for start, stop in runs(mask)])
    assert least <= lengths.min()
    assert lengths.max() <= most
    masked = masks.sum() / (1000 * 5)  # 0.03 * 1000 / 6 = 5 spans each
    assert masked == pytest.approx(mean, rel=0.06)


@given(st.sampled_from(STRATEGIES), st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(0, 2**32))
@settings(deadline=None, max_examples=300)
def test_any_lengths(spans: Spans, lengths: list[int], seed: int) -> None:
    frames = np.array(lengths)
    masks = spans.draw_masks(frames, max(lengths), np.random.default_rng(seed))
    assert masks.shape == (len(lengths), max(lengths))
    for mask, length in zip(masks, lengths, strict=True):
        assert not mask[length:].any()
        # Only a span that must not be cut may not fit.
        assert length == 1 or spans.min_spans == 0 or spans.no_overlap or mask.any()
        if spans.no_overlap:
            for (_, stop), (start, _) in pairwise(runs(mask)):
                assert start - stop >= spans.min_space
            if spans.selection == "static" and spans.min_space:
                assert all(stop - start == spans.length for start, stop in runs(mask))
    indices = spans.draw(frames, [np.random.default_rng(seed)])
    assert indices.shape == (len(lengths), masks.sum(1).min())
    for row, mask in zip(indices, masks, strict=True):
        assert row.tolist() == sorted(set(row.tolist()))
        assert mask[row].all()


def test_kept_frames_are_chosen_at_random() -> None:
    """Rows cut to the smallest number of masked frames lose them anywhere."""
    spans = Spans(1.0, "static", 0.0, 1, no_overlap=True, min_space=0, min_spans=2)
    lengths = np.array([40, 10])
    kept = np.zeros(40)
    for seed in range(3000):
        np.add.at(kept, spans.draw(lengths, [np.random.default_rng(seed)])[0], 1)
    expected = kept.sum() / 40
    assert ((kept - expected) ** 2 / expected).sum() < 72.1  # 99.9 % quantile with 39 degrees of freedom


@pytest.mark.parametrize(
    "spans", STRATEGIES, ids=lambda s: f"{s.selection}-{s.prob}-{'apart' if s.no_overlap else 'any'}"
)
def test_draws_by_row_do_not_depend_on_the_batch(spans: Spans) -> None:
    lengths = [50, 80, 120]
    together = [
        spans.draw_masks(np.array([length]), 120, np.random.default_rng(i))[0] for i, length in enumerate(lengths)
    ]
    indices = spans.draw(np.array(lengths), [np.random.default_rng(i) for i in range(3)])
    for i, mask in enumerate(together):
        assert mask[indices[i]].all()
    # The row with the fewest masked frames always keeps them all.
    fewest = int(np.argmin([mask.sum() for mask in together]))
    alone = spans.draw(np.array([lengths[fewest]]), [np.random.default_rng(fewest)])
    np.testing.assert_array_equal(indices[fewest], alone[0])


@given(
    spans=st.sampled_from(STRATEGIES),
    lengths=st.lists(st.integers(20, 150), min_size=1, max_size=6),
    more=st.lists(st.integers(20, 150), max_size=6),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_masks_of_a_row_are_nested_whatever_it_is_batched_with(
    spans: Spans, lengths: list[int], more: list[int], seed: int
) -> None:
    """Each row orders its frames by itself; the batch only decides how many of the first are kept."""

    def draw(lengths: list[int]) -> list[set[int]]:
        rngs = [np.random.default_rng((seed, row)) for row in range(len(lengths))]
        return [set(row) for row in spans.draw(np.array(lengths), rngs).tolist()]

    for some, other in zip(draw(lengths), draw([*lengths, *more]), strict=False):
        assert other <= some


@given(rows=st.permutations(range(8)), sizes=st.lists(st.integers(1, 4), min_size=8), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_channels_of_a_row_do_not_depend_on_the_batch(rows: list[int], sizes: list[int], seed: int) -> None:
    masks = MaskGenerator(MaskingConfig(mask_channel_prob=0.3, mask_channel_length=8))

    def draw(rows: list[int]) -> np.ndarray:
        return masks.draw_channels(len(rows), 64, [np.random.default_rng((seed, row)) for row in rows])

    whole, at = draw(list(range(8))), 0
    for size in sizes:
        part = rows[at : at + size]
        at += size
        if part:
            np.testing.assert_array_equal(draw(part), whole[part])


def test_public_generator() -> None:
    masks = MaskGenerator(MaskingConfig())
    padding = torch.zeros(3, 100, dtype=torch.bool)
    padding[1, 60:] = True
    generator = torch.Generator().manual_seed(5)
    mask, channel_mask = masks(padding, generator=generator)
    assert channel_mask is None
    assert mask.dtype == torch.bool
    assert mask.shape == (3, 100)
    assert not (mask & padding).any()
    assert mask.sum(1).unique().numel() == 1
    assert torch.equal(masks(padding, generator=torch.Generator().manual_seed(5))[0], mask)
    assert not torch.equal(masks(padding, generator=generator)[0], mask)
    torch.manual_seed(3)
    first = masks(padding)[0]
    torch.manual_seed(3)
    assert torch.equal(masks(padding)[0], first)


def test_channels() -> None:
    cfg = MaskingConfig(mask_channel_prob=0.3, mask_channel_length=8)
    padding = torch.zeros(4, 100, dtype=torch.bool)
    mask, channel_mask = MaskGenerator(cfg)(padding, channels=64, generator=torch.Generator().manual_seed(0))
    assert channel_mask is not None
    assert channel_mask.shape == (4, 64)
    assert 0 < channel_mask.sum(1)[0] <= 3 * 8
    assert channel_mask.sum(1).unique().numel() == 1
    assert mask.shape == (4, 100)
    assert MaskGenerator(cfg)(padding)[1] is None
    assert MaskGenerator(MaskingConfig())(padding, channels=64)[1] is None
    # There is no minimum: with a small share, most batches mask no channel.
    rare = MaskGenerator(replace(cfg, mask_channel_prob=0.01))
    assert not rare.draw_channels(4, 64, [np.random.default_rng(0)]).all(1).any()
    assert sum(rare.draw_channels(1, 64, [np.random.default_rng(i)]).any() for i in range(200)) < 40

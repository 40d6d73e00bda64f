"""Unit quality against slow oracles written from the definitions, and cases with known answers."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from spidr.models.metrics import UnitsQuality, bitrate, build_count_matrix, perplexity, proba_phone_code, units_quality
from spidr.tools.errors import InputError

PHONES = ["SIL", "AA", "B", "ʃ"]
NUM_UNITS = 5
Data = dict[str, tuple[list[str], list[int]]]


@st.composite
def datasets(draw: st.DrawFn) -> Data:
    data = {}
    for number in range(draw(st.integers(1, 4))):
        units = draw(st.lists(st.integers(0, NUM_UNITS - 1), min_size=2, max_size=20))
        length = 2 * len(units) + draw(st.integers(-2, 2))
        data[f"utterance{number}"] = (draw(st.lists(st.sampled_from(PHONES), min_size=length, max_size=length)), units)
    return data


def frames(data: Data, repeat: int = 2) -> list[tuple[str, int]]:
    """Every (phone, unit) frame, one by one; zip cuts to the shorter sequence."""
    return [
        pair
        for phones, units in data.values()
        for pair in zip(phones, (unit for unit in units for _ in range(repeat)), strict=False)
    ]


def entropy(counts: Counter) -> float:
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values())


def oracle(data: Data) -> UnitsQuality:
    pairs = frames(data)
    joint, phones, units = Counter(pairs), Counter(p for p, _ in pairs), Counter(u for _, u in pairs)
    merged = sum(1 for _, sequence in data.values() for _ in itertools.groupby(sequence))
    seconds = sum(len(sequence) for _, sequence in data.values()) * 0.02
    return UnitsQuality(
        phone_purity=sum(max(joint[p, u] for p in phones) for u in units) / len(pairs),
        cluster_purity=sum(max(joint[p, u] for u in units) for p in phones) / len(pairs),
        pnmi=(entropy(phones) + entropy(units) - entropy(joint)) / max(entropy(phones), 1e-10),
        codebook_perplexity=2 ** entropy(units),
        active_codewords=len(units),
        bitrate=math.log2(NUM_UNITS) * merged / seconds,
    )


@settings(max_examples=100, deadline=None)
@given(datasets())
def test_units_quality(data: Data) -> None:
    quality, expected = units_quality(data, num_units=NUM_UNITS, num_phones=len(PHONES)), oracle(data)
    assert quality._replace(pnmi=0) == pytest.approx(expected._replace(pnmi=0), rel=1e-9, abs=1e-9)
    single = len({phone for phone, _ in frames(data)}) == 1  # rounding errors of entropies are divided by 1e-10
    assert quality.pnmi == pytest.approx(expected.pnmi, rel=1e-9, abs=1e-5 if single else 1e-9)


def test_perfect_units() -> None:
    phones = [p for p in PHONES for _ in range(10)]
    data = {"a": (phones, [u for u in range(4) for _ in range(5)])}
    quality = units_quality(data, num_units=4, num_phones=4)
    assert quality == pytest.approx(UnitsQuality(1.0, 1.0, 1.0, 4.0, 4, 2 * 4 / 0.4))
    one = units_quality({"a": (phones, [3] * 20)}, num_units=4, num_phones=4)
    assert one == pytest.approx(UnitsQuality(0.25, 1.0, 0.0, 1.0, 1, 2 / 0.4), abs=1e-12)


def test_a_single_phone_has_no_information_to_explain() -> None:
    quality = units_quality({"a": (["SIL"] * 8, [0, 1, 2, 3])}, num_units=4, num_phones=40)
    assert quality.pnmi == pytest.approx(0, abs=1e-5)
    assert quality.phone_purity == 1


def test_other_frame_steps() -> None:
    """One unit per label, and four labels per unit, against the same frames written out."""
    rng = np.random.default_rng(0)
    units = rng.integers(0, NUM_UNITS, 50).tolist()
    phones = rng.choice(PHONES, 200).tolist()
    wide = units_quality({"a": (phones, units)}, num_units=NUM_UNITS, num_phones=4, frame_step=40)
    repeated = [unit for unit in units for _ in range(4)]
    narrow = units_quality({"a": (phones, repeated)}, num_units=NUM_UNITS, num_phones=4, frame_step=10)
    assert wide == pytest.approx(narrow)


@settings(max_examples=50, deadline=None)
@given(datasets())
def test_count_matrix(data: Data) -> None:
    counts, names = build_count_matrix(data, NUM_UNITS, len(PHONES), 2)
    joint = Counter(frames(data))
    assert counts.dtype == torch.int64
    assert counts.shape == (len(names), NUM_UNITS)
    assert {(p, u): n for p, row in zip(names, counts.tolist(), strict=True) for u, n in enumerate(row) if n} == joint
    totals = counts.sum(1).tolist()
    ranks = [(-total, name) for total, name in zip(totals, names, strict=True)]
    assert ranks == sorted(ranks)


def test_recordings_are_cut_to_the_shorter() -> None:
    counts, names = build_count_matrix({"a": (["A", "B", "B", "A"], [0])}, 2, 2, 2)
    assert (counts.tolist(), names) == ([[1, 0], [1, 0]], ["A", "B"])
    counts, names = build_count_matrix({"a": (["A"], [0, 1, 1])}, 2, 2, 1)
    assert (counts.tolist(), names) == ([[1, 0]], ["A"])
    counts, _ = build_count_matrix({"a": (["A"] * 9, [0, 1])}, 2, 2, 2, max_length_diff=5)
    assert counts.tolist() == [[2, 2]]


@settings(max_examples=50, deadline=None)
@given(datasets(), st.booleans())
def test_proba_phone_code(data: Data, only_active: bool) -> None:
    proba, names, columns = proba_phone_code(data, num_units=NUM_UNITS, num_phones=4, only_active=only_active)
    units = columns.tolist()
    counts, rows = build_count_matrix(data, NUM_UNITS, 4, 2)
    occurring = {u for u in range(NUM_UNITS) if counts[:, u].any()}
    assert names == rows
    assert proba.dtype == torch.float64
    assert proba.shape == (len(names), len(units))
    assert sorted(units) == (sorted(occurring) if only_active else list(range(NUM_UNITS)))
    assert set(units[: len(occurring)]) == occurring
    for column, unit in enumerate(units):
        total = max(int(counts[:, unit].sum()), 1)
        assert proba[:, column].tolist() == pytest.approx([n / total for n in counts[:, unit].tolist()])
    best = [(row, -p) for p, row in zip(*(t.tolist() for t in proba[:, : len(occurring)].max(0)), strict=True)]
    assert best == sorted(best)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "no frame with both a phone and a unit"),
        ({"x": ([], [])}, "no frame with both a phone and a unit"),
        ({"x": (["A"] * 7, [0, 0])}, "x: 7 phones and 2 units of 2 frames each differ by more than 2 frames"),
        ({"x": (["A"], [0, 0])}, "x: 1 phones and 2 units"),
        ({"x": (["A", "B"], [3])}, "x: units from 3 to 3, expected from 0 to 2"),
        ({"x": (["A", "B"], [-1])}, "x: units from -1 to -1, expected from 0 to 2"),
        ({"x": (["A", "B"], [0.5])}, "x: units must be a list of integers, found float64"),
        ({"x": (["A", "B"], [[1]])}, "x: units must be a list of integers, found int64 of shape"),
        ({"x": (["A", "B", "C", "D"], [1, 2])}, "found more than 3 phones, up to x: A B C D"),
    ],
)
def test_bad_data(data: Data, message: str) -> None:
    for function, options in ((units_quality, {}), (proba_phone_code, {"only_active": True})):
        with pytest.raises(InputError) as info:
            function(data, num_units=3, num_phones=3, **options)  # type: ignore[arg-type]
        assert str(info.value).startswith(message)


def test_bad_steps() -> None:
    for frame_step, alignment_step in ((20, 15), (10, 20)):
        with pytest.raises(InputError, match="is not a multiple of alignment_step"):
            units_quality(
                {"x": (["A"], [0])}, num_units=3, num_phones=3, frame_step=frame_step, alignment_step=alignment_step
            )


def test_bitrate() -> None:
    assert bitrate(num_units=256) == 8 * 50
    assert bitrate(num_units=256, frame_step=40) == 8 * 25
    assert bitrate(num_units=16, sequences=[[1, 1, 2, 2, 1], [], [3, 3, 3, 3, 3]]) == pytest.approx(4 * 4 / 0.2)
    assert bitrate(num_units=16, sequences=(s for s in [[1, 2, 3]])) == pytest.approx(bitrate(num_units=16))
    with pytest.raises(InputError, match="no unit"):
        bitrate(num_units=16, sequences=[[]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_perplexity(dtype: torch.dtype) -> None:
    y = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)).softmax(-1).to(dtype)
    rows = y.double().tolist()
    of = [2 ** -sum(p * math.log2(p) for p in row) for row in [np.mean(rows, 0).tolist(), *rows]]
    for value, expected in ((perplexity(y), of[0]), (perplexity(y, tokenwise=True), np.mean(of[1:]))):
        assert value.shape == ()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.item() == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_assignments() -> None:
    onehot = torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 3]), 5)
    assert perplexity(onehot).item() == pytest.approx(2**1.5)
    assert perplexity(onehot, tokenwise=True).item() == 1
    assert perplexity(torch.full((3, 8), 1 / 8), tokenwise=True).item() == pytest.approx(8)


def test_perplexity_has_a_gradient() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: perplexity(x.softmax(-1)), logits)

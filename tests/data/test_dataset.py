"""Whole recordings as tensors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from helpers.synthetic import noise
from spidr.config import DEFAULT_CONV_LAYER_CONFIG
from spidr.data import speech_dataset
from spidr.data.dataset import conv_length


def test_rows(recordings: Callable[..., Path]) -> None:
    manifest = recordings([16_000, 401, 3000])
    raw, standardized = (speech_dataset(manifest, normalize=normalize) for normalize in (False, True))
    assert len(raw) == raw.manifest.height == 3
    assert raw.manifest["num_samples"].to_list() == [16_000, 401, 3000]
    for i, length in enumerate([16_000, 401, 3000]):
        expected = torch.from_numpy(noise(length, i) / np.float32(32768))
        assert torch.equal(raw[i], expected)
        torch.testing.assert_close(
            standardized[i], torch.nn.functional.layer_norm(expected, (length,), eps=1e-5), atol=2e-6, rtol=0
        )
    assert [Path(row.path).name for row in raw.recordings(np.array([1, 0]))] == ["00001.wav", "00000.wav"]
    assert torch.equal(raw[-1], raw[2])
    with pytest.raises(IndexError):
        raw[3]
    assert len(list(raw)) == 3


@given(
    st.lists(st.tuples(st.just(1), st.integers(1, 10), st.integers(1, 5)), min_size=1, max_size=4), st.integers(0, 500)
)
def test_conv_length_is_the_length_of_a_convolution(shapes: list[tuple[int, int, int]], length: int) -> None:
    expected = length
    for _, kernel, stride in shapes:
        expected = len(range(0, expected - kernel + 1, stride))
    assert conv_length(shapes, length) == expected
    assert conv_length(shapes, torch.tensor([length])).tolist() == [expected]
    assert conv_length(shapes, np.array([length])).tolist() == [expected]


def test_conv_length_of_the_default_extractor() -> None:
    assert conv_length(DEFAULT_CONV_LAYER_CONFIG, torch.tensor([0, 399, 400, 16_000])).tolist() == [0, 0, 1, 49]

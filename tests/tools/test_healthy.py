"""The published curve."""

import pytest

from spidr.config import DinoSRConfig, SpidRConfig
from spidr.tools.healthy import expected_loss, is_base, unlike_published


def test_expected_loss() -> None:
    assert expected_loss(0) == (5.57, 5.57)
    assert expected_loss(5_000) == (2.28, 2.51)
    assert expected_loss(15_000) == pytest.approx(((2.04 + 1.59) / 2, (2.19 + 1.75) / 2))
    assert expected_loss(10**9) == (0.94, 1.41)


def test_unlike_published() -> None:
    assert unlike_published(10_000, 2.1, [200, 193]) == ""
    assert unlike_published(100, 9.0, [3]) == ""  # too early to tell
    assert unlike_published(10_000, 2.9) == "the validation loss is 2.90, in published runs at most 2.19 by then"
    assert unlike_published(2_500, None, [200, 40]) == "a codebook uses 40 codewords, in published runs at least 191"


def test_base_model() -> None:
    assert is_base(SpidRConfig(freeze_step=3))
    assert not is_base(SpidRConfig(encoder_num_layers=11))
    assert not is_base(DinoSRConfig())

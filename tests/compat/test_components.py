"""The blocks compute what the published package's blocks compute."""

from pathlib import Path

import pytest
import torch

from side_by_side import blocks

GOLDEN = Path(__file__).parents[1] / "golden" / "published"


def test_blocks_compute_what_published_ones_do() -> None:
    expected, found = torch.load(GOLDEN / "blocks.pt"), blocks.outputs()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].float() - value.float()).abs().max() < 1e-5, name


def test_masks_of_both_kinds() -> None:
    index = torch.tensor([[0, 2], [1, 3]])
    mask = blocks.mask_from_index(index, 5)
    assert mask.tolist() == [[True, False, True, False, False], [False, True, False, True, False]]
    assert blocks.mask_from_index(mask, 5) is mask


@pytest.mark.parametrize("number", [0, 4, -1])
def test_number_of_layers(number: int) -> None:
    with pytest.raises(ValueError, match="3"):
        blocks.transformer(layer_norm_first=False).get_intermediate_outputs(torch.zeros(1, 4, 8), None, number)

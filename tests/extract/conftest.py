"""A model shared by all tests of extraction."""

from pathlib import Path

import pytest
import torch

from helpers.extraction import save, small
from spidr.models import DinoSR


@pytest.fixture(scope="session")
def model() -> DinoSR:
    return small()


@pytest.fixture(scope="session")
def checkpoint(model: DinoSR, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose units vary: its heads read how features differ from their mean."""
    model = small(seed=1)
    noise = 0.1 * torch.randn(1, 160_000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer, head in zip(model.codebook_layers, model.heads, strict=True):
            features = model.encode(noise, layer=layer)[0][0]
            head[0].weight.normal_(generator=torch.Generator().manual_seed(layer)).div_(features.std(0))
            head[0].bias.copy_(-head[0].weight @ features.mean(0))
    return save(model, tmp_path_factory.mktemp("varied"))

"""A model for all tests of extraction."""

from pathlib import Path

import pytest

from helpers.extraction import save, small
from spidr.models import DinoSR


@pytest.fixture(scope="session")
def model() -> DinoSR:
    return small()


@pytest.fixture(scope="session")
def checkpoint(model: DinoSR, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("model"))

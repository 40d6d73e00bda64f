"""Packages whose names are imported when they are first used look as if they had been imported at once."""

import subprocess
import sys

import pytest

CODE = """
import sys
import spidr.data, spidr.models

assert "torch" not in sys.modules
assert spidr.models.dinosr.DinoSR is spidr.models.DinoSR  # modules are there without being imported by name
assert "polars" not in sys.modules
for package in (spidr.data, spidr.models):
    for name in package.__all__:
        assert callable(getattr(package, name)), name
from spidr.models import *
assert SpidR is spidr.models.spidr.SpidR
"""


def test_names_are_there_when_they_are_used() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_missing_is_said() -> None:
    import spidr.models

    with pytest.raises(AttributeError, match=r"module 'spidr\.models' has no attribute 'SpidS'"):
        spidr.models.SpidS  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'SpidS'"):
        from spidr.models import SpidS  # type: ignore[attr-defined]  # noqa: F401

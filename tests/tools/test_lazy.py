"""Lazily imported names look as if they had been imported at once."""

import importlib
import subprocess
import sys
from pathlib import Path

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


def test_names_are_imported_when_used() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_missing_packages_are_named() -> None:
    import spidr.models

    with pytest.raises(AttributeError, match=r"module 'spidr\.models' has no attribute 'SpidS'"):
        spidr.models.SpidS  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'SpidS'"):
        from spidr.models import SpidS  # type: ignore[attr-defined]  # noqa: F401


def test_a_broken_module_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An AttributeError during an import does not mean a missing name."""
    (tmp_path / "lazily").mkdir()
    lines = [
        "from spidr.tools.lazy import lazy_names",
        "__getattr__, __all__ = lazy_names(__name__, posix='run')",
    ]
    (tmp_path / "lazily/__init__.py").write_text("\n".join(lines))
    (tmp_path / "lazily/posix.py").write_text("import signal\nsignal.SIGNOTHING\ndef run(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ImportError, match=r"cannot import lazily\.posix: module 'signal' has no attribute 'SIGNOTHING'"
    ):
        from lazily import run  # type: ignore[import-not-found]  # noqa: F401


@pytest.mark.parametrize("name", ["data", "models"])
def test_dir_lists_public_names(name: str) -> None:
    package = importlib.import_module(f"spidr.{name}")
    assert dir(package) == sorted(package.__all__)

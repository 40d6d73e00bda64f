"""Import names on first use, and say which extra a missing package belongs to.

Importing torch takes seconds, so nothing that does not need it should wait for it.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from spidr.tools.errors import InputError


def lazy_names(package: str, here: str = "", **modules: str) -> tuple[Callable[[str], Any], list[str]]:
    """Offer names of a package's modules, and the modules, in the package itself; they are imported on first use.

    ``modules`` maps each module to its public names, separated by blanks; ``here`` are those that the package defines
    itself. Returns the package's ``__getattr__`` and its ``__all__``, which ``dir`` then lists.
    """
    module_of = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> Any:
        module = f"{package}.{module_of.get(name, name)}"
        try:
            found = _import(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise AttributeError(f"module {package!r} has no attribute {name!r}") from None
        value = getattr(found, name) if name in module_of else found
        setattr(sys.modules[package], name, value)  # so that this function is called only once per name
        return value

    names = sorted([*here.split(), *module_of])
    sys.modules[package].__dir__ = lambda: names  # type: ignore[method-assign]
    return get, names


def names_from(package: str, module: str) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a package that offers another module's ``__all__``, imported on first use."""

    def get(name: str) -> Any:
        found = None if name.startswith("__") else _import(module)
        if found is None or name not in found.__all__:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(found, name)

    return get


def _import(module: str) -> ModuleType:
    """Import a module; ``from … import`` would mistake an AttributeError inside it for a missing name."""
    try:
        return import_module(module)
    except AttributeError as error:
        raise ImportError(f"cannot import {module}: {error}") from error


@contextmanager
def needs_extra(extra: str, note: str = "") -> Iterator[None]:
    """Turn a failed import of another package into an InputError that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "spidr"):
            raise
        raise InputError(f"`{package}` is missing: install it with `pip install 'spidr[{extra}]'`{note}") from None


@contextmanager
def command_needs(extra: str, module_name: str) -> Iterator[None]:
    """Apply :func:`needs_extra` to the imports of a module if it runs as a command, which then ends with status 2."""
    if module_name != "__main__":
        yield
        return
    try:
        with needs_extra(extra):
            yield
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine
            sys.stderr.write(f"error: {error}\n")
        sys.exit(2)

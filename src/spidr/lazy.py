"""Packages whose names are imported when they are first used, so that no command waits for what it does not need.

Importing torch takes seconds. Imports nothing of the package itself.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_names(package: str, modules: dict[str, str]) -> Callable[[str], Any]:
    """A module-level ``__getattr__`` for a package.

    Args:
        package: Its ``__name__``.
        modules: Name → the module of the package that has it. Modules themselves are found without being listed.
    """

    def get(name: str) -> Any:
        module = f"{package}.{modules.get(name, name)}"
        try:
            found = import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise AttributeError(f"module {package!r} has no attribute {name!r}") from None
        value = getattr(found, name) if name in modules else found
        setattr(sys.modules[package], name, value)  # the next time it is there at once
        return value

    return get

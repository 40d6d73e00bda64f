"""``python docs/build.py [FOLDER]``: the reference of the Python API as HTML, from the docstrings.

Needs the extra ``docs``. A warning is an error.
"""

import pkgutil
import re
import sys
import warnings
from pathlib import Path

import pdoc
from pdoc import docstrings

import spidr

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")


def main() -> None:
    """Write a page for each module."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "build"
    google = docstrings.google
    # pdoc links names in backticks and does not know Sphinx's roles.
    docstrings.google = lambda text: google(ROLE.sub(r"`\1`", text))
    warnings.simplefilter("error", UserWarning)
    # pdoc does not find the module that the annotations of a NamedTuple are in; it shows them as they are written.
    warnings.filterwarnings("ignore", r"Error parsing type annotation ForwardRef\(.*__init__", UserWarning)
    names = [module.name for module in pkgutil.walk_packages(spidr.__path__, "spidr.")]
    for package in [sys.modules[name] for name in names if name in sys.modules]:
        for name in getattr(package, "__all__", ()):
            getattr(package, name)  # pdoc does not ask for what is imported when it is first used
    # Of a package with __all__, pdoc takes no other module by itself.
    hidden = [name for name in names if hasattr(sys.modules.get(name.rpartition(".")[0]), "__all__")]
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("spidr", *(name for name in hidden if not name.endswith("__main__")), output_directory=folder)
    sys.stdout.write(f"{folder / 'index.html'}\n")


if __name__ == "__main__":
    main()

"""Sphinx configuration: see ``build.py``."""

import ast
import dataclasses
import inspect
import io
import json
import pkgutil
import tokenize
from pathlib import Path

from sphinx.application import Sphinx

import spidr
from spidr import config
from spidr.tools.schema import REQUIRED

project = "SpidR"
version = release = spidr.__version__
copyright = "the SpidR authors, CC BY-NC 4.0"  # noqa: A001
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["build"]
html_theme = "furo"
html_title = f"SpidR {version}"
html_copy_source = False
myst_enable_extensions = ["colon_fence"]
suppress_warnings = ["ref.python"]  # names with more than one target
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

REFERENCE = {
    "models": "Models: load, run, train",
    "config": "Configurations",
    "extract": "Extraction",
    "evaluate": "Evaluation",
    "data": "Data",
    "train": "Training",
    "export": "Export",
    "report": "Reports",
    "slurm": "SLURM",
    "tools": "Tools",
}
"""Pages of the reference: packages or modules and their titles. All other modules are on the page `train`."""


def write_reference(app: Sphinx) -> None:
    """Write a page per part of the package, and one with all settings."""
    folder = Path(app.srcdir) / "reference"
    folder.mkdir(exist_ok=True)
    found = list(pkgutil.walk_packages(spidr.__path__, "spidr."))
    packages = {module.name for module in found if module.ispkg}  # their names are documented where they are defined
    names = [module.name for module in found]
    hidden = ("__main__", ".components", ".utils")  # like .compat, kept for code written for the published package
    names = [name for name in names if not name.endswith(hidden) and ".compat" not in name]
    pages: dict[str, list[str]] = {part: [] for part in REFERENCE}
    for name in names:
        part = name.split(".")[1]
        pages[part if part in REFERENCE else "train"].append(name)
    first = [f"spidr.models{name}" for name in ("", ".encoder", ".hub", ".spidr", ".dinosr")]  # what users look for
    pages["models"] = first + [name for name in pages["models"] if name not in first]
    for part, modules in pages.items():
        title = REFERENCE[part]
        bodies = [
            f"{name}\n{'-' * len(name)}\n\n.. automodule:: {name}\n{'' if name in packages else '   :members:'}\n"
            for name in modules
        ]
        write(folder / f"{part}.rst", "\n".join([f"{title}\n{'=' * len(title)}\n", *bodies]))
    toctree = "".join(f"   {part}\n" for part in REFERENCE)
    write(folder / "index.rst", f"The Python API\n==============\n\n.. toctree::\n   :maxdepth: 1\n\n{toctree}")
    write(folder / "settings.rst", settings())


def settings() -> str:
    """All settings with their defaults and comments in ``config.py``, section by section."""
    text = "Settings\n========\n\nA configuration file (TOML or JSON) lists only what differs from these defaults.\n"
    sections = {
        "run": config.RunConfig,
        "run.slurm_validation": config.SlurmConfig,
        "data": config.DataConfig,
        "model": config.SpidRConfig,
        "masking": config.MaskingConfig,
        "optimizer": config.OptimizerConfig,
    }
    for name, cls in sections.items():
        title = "[data] and [validation.NAME]" if name == "data" else f"[{name}]"
        text += f"\n{title}\n{'-' * len(title)}\n\n.. list-table::\n   :header-rows: 1\n   :widths: 30 20 50\n\n"
        text += "   * - setting\n     - default\n     - \n"
        meanings = {key: value for parent in reversed(cls.__mro__[:-2]) for key, value in comments(parent).items()}
        for field in dataclasses.fields(cls):
            text += f"   * - ``{field.name}``\n     - {default(field)}\n     - {meanings.get(field.name, '')}\n"
    return text


def default(field: dataclasses.Field[object]) -> str:
    """The default of a setting, as written in a file."""
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory
    if value in (dataclasses.MISSING, REQUIRED):
        return "required"
    value = value() if callable(value) else value
    return "none" if value is None else f"``{json.dumps(value)}``"


def comments(cls: type) -> dict[str, str]:
    """The comment beside each field of a dataclass."""
    source = inspect.getsource(cls)
    at = {
        token.start[0]: token.string[2:]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: at[node.end_lineno] for node in fields if node.end_lineno in at}


def write(path: Path, text: str) -> None:
    """Write a file only if it has changed, so that Sphinx does not rebuild it."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Connect to Sphinx."""
    app.connect("builder-inited", write_reference)

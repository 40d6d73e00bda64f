"""The package's code as a job finds it: a copy of it, and where it comes from."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from spidr.tools.programs import run_program

PACKAGE = Path(__file__).resolve().parents[1]


def is_installed() -> bool:
    """Whether the package that runs is an installed copy, which stays as it is, rather than someone's working tree."""
    return not {"site-packages", "dist-packages"}.isdisjoint(PACKAGE.parts)


def copy_package(destination: Path) -> None:
    """Copy the package into a folder: its modules, and what git tracks of its other files. Links are left out."""
    try:
        tracked = {os.fsdecode(name) for name in _git("ls-files", "-z").split(b"\0")}
    except (OSError, subprocess.SubprocessError):
        tracked = None
    for name in _own_files():
        if name.suffix == ".py" or tracked is None or str(name) in tracked:
            copy = destination / PACKAGE.name / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PACKAGE / name, copy)


def _own_files() -> Iterator[Path]:
    """Regular files of the package that are not hidden, as paths in it."""
    for root, folders, files in os.walk(PACKAGE):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for path in (Path(root, name) for name in files if not name.startswith(".")):
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(PACKAGE)


def describe_checkout() -> dict[str, bytes]:
    """What is needed to find the code again: files for the job folder.

    Returns:
        ``git-info.txt`` with branch and commit and ``git-diff.patch`` with the package's changes since, if git tracks
        the package; nothing for an installed one, even if its environment lies inside some checkout.
    """
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")
        branch, commit = _git("rev-parse", "--abbrev-ref", "HEAD"), _git("rev-parse", "HEAD")
        diff = _git("diff", "HEAD", "--", ".", ":(exclude,glob)**/.*", ":(exclude,glob)**/.*/**")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git-info.txt": b"branch: %scommit: %s" % (branch, commit), "git-diff.patch": diff}


def _git(*arguments: str) -> bytes:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = run_program(["git", "-C", str(PACKAGE), *arguments], environment=environment)
    done.check_returncode()
    return done.stdout

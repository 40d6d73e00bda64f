"""The code that a job runs: a copy of the package, and its origin."""

import os
import shutil
import subprocess
from pathlib import Path

from spidr.tools.programs import run_program

PACKAGE = Path(__file__).resolve().parents[1]


def is_installed() -> bool:
    """Whether this package is installed, not in a working tree, which may change."""
    return not {"site-packages", "dist-packages"}.isdisjoint(PACKAGE.parts)


def copy_package(destination: Path) -> None:
    """Copy the package into a folder: its modules and other files tracked by git, without links."""
    try:
        tracked = {os.fsdecode(name) for name in _git("ls-files", "-z").split(b"\0")}
    except (OSError, subprocess.SubprocessError):
        tracked = None
    for root, folders, files in os.walk(PACKAGE):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for path in (Path(root, name) for name in files if not name.startswith(".")):
            name = path.relative_to(PACKAGE)
            is_own = path.suffix == ".py" or tracked is None or str(name) in tracked
            if is_own and path.is_file() and not path.is_symlink():
                copy = destination / PACKAGE.name / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


def describe_checkout() -> dict[str, bytes]:
    """Make ``git-info.txt`` (branch and commit) and ``git-diff.patch`` (the package's changes) for the job folder.

    Empty if git does not track the package, even if it is installed somewhere inside a checkout.
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

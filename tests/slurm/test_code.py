"""The code that goes with a job."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from spidr.slurm import code


def git(folder: Path, *args: str) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run(["git", "-C", str(folder), *identity, *args], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a package tracked by git and an installed, untracked one."""
    for place in ("src", ".venv/site-packages"):
        package = tmp_path / "repo" / place / "spidr"
        (package / "tools").mkdir(parents=True)
        for name in ("__init__.py", "tools/new.py", "clusters.toml"):
            (package / name).write_text("1\n")
    git(tmp_path, "init", "--initial-branch=topic", "repo")
    git(tmp_path / "repo", "add", "src/spidr/__init__.py", "src/spidr/clusters.toml")
    git(tmp_path / "repo", "commit", "-m", "x")
    monkeypatch.setattr(code, "PACKAGE", tmp_path / "repo/src/spidr")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "repo"


def test_the_checkout_is_the_running_code_s(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the current folder's, nor one that happens to contain an environment with the installed package."""
    commit = (checkout / ".git/refs/heads/topic").read_text().strip()
    found = code.describe_checkout()
    assert found == {"git-info.txt": f"branch: topic\ncommit: {commit}\n".encode(), "git-diff.patch": b""}
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("GIT_DIR", str(checkout / ".git"))
    monkeypatch.setattr(code, "PACKAGE", checkout / ".venv/site-packages/spidr")
    assert code.describe_checkout() == {}


def test_the_diff_is_the_package_s(checkout: Path) -> None:
    (checkout / "src/spidr/__init__.py").write_text("2\n")
    for name in ("secret.ini", "src/spidr/.env"):
        (checkout / name).write_text("SECRET\n")
        git(checkout, "add", "-N", name)
    diff = code.describe_checkout()["git-diff.patch"]
    assert b"-1\n+2\n" in diff
    assert b"SECRET" not in diff


@pytest.mark.parametrize("tracked", [True, False])
def test_only_the_package_s_files_are_copied(checkout: Path, tmp_path: Path, tracked: bool) -> None:
    package = checkout / "src/spidr"
    if not tracked:
        shutil.rmtree(checkout / ".git")
    (tmp_path / "keys").mkdir()
    for path in (tmp_path / "keys/id_rsa", package / ".env", package / ".git/x.py", package / "__pycache__/x.py"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("SECRET")
    (package / "keys").symlink_to(tmp_path / "keys")
    (package / "link.py").symlink_to(tmp_path / "keys/id_rsa")
    if tracked:
        (package / "notes.txt").write_text("SECRET")
    code.copy_package(tmp_path / "copy")
    files = {
        str(path.relative_to(tmp_path / "copy/spidr")) for path in (tmp_path / "copy").rglob("*") if path.is_file()
    }
    assert files == {"__init__.py", "tools/new.py", "clusters.toml"}

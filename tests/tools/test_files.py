"""Files that are complete or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from spidr.tools.errors import InputError
from spidr.tools.files import atomic_write, check_regular, expand, find_files, remove_unfinished


def test_replaces_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with atomic_write(path) as file:
        file.write(b"after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_leaves_nothing_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyError), atomic_write(path) as file:  # noqa: PT012
        file.write(b"half")
        raise KeyError
    with pytest.raises(InputError, match="file: cannot be written \\(No space left on device\\)"), atomic_write(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [InputError("the input is missing"), KeyboardInterrupt()])
def test_other_errors_stay_what_they_are(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, atomic_write(tmp_path / "file"):  # noqa: PT012
        try:
            (tmp_path / "missing").read_bytes()
        except OSError:
            raise error from None
    assert caught.value is error


def test_full_disk_while_torch_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real thing: /dev/full takes no byte."""
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args: opened(Path("/dev/full"), "wb"))
    with pytest.raises(InputError, match="No space left on device"), atomic_write(tmp_path / "x.pt") as file:
        torch.save({"x": torch.zeros(100_000)}, file)


def test_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file or directory"), atomic_write(tmp_path / "none" / "file"):
        pass


def test_remains_of_killed_processes_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".step_3.pt.77.tmp").touch()
    (tmp_path / "step_2.pt").touch()
    (tmp_path / ".a.tmp").mkdir()  # not of atomic_write
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step_2.pt", ".a.tmp"}


def test_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv("HOME", "/home/me")
    assert expand("$SCRATCH/a") == expand("${SCRATCH}/a") == Path("/scratch/a")
    assert expand(Path("~/a b")) == Path("/home/me/a b")
    assert expand("a$NO_SUCH_VARIABLE~") == Path("a$NO_SUCH_VARIABLE~")


def test_what_reading_would_wait_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/null"):
        with pytest.raises(InputError, match=f"{path}: not a regular file"):
            check_regular(path)
    with pytest.raises(InputError, match="not the name of a file"):
        check_regular("a\0b")
    check_regular(tmp_path / "missing")


def test_links_are_followed_and_loops_are_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "corpus"
    for name in ("corpus/en/1.wav", "corpus/en/._1.wav", "corpus/en/1.txt", "elsewhere/deep/2.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (root / "fr").symlink_to("../elsewhere")
    (root / "it").symlink_to(tmp_path / "elsewhere" / "deep")
    (root / "loop").symlink_to(root)
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to("../..")
    (root / "en" / "one.wav").symlink_to("1.wav")
    found = find_files(root, lambda name: name.endswith(".wav"))
    assert [os.path.relpath(path, root) for path in found] == ["en/1.wav", "en/one.wav", "fr/deep/2.wav", "it/2.wav"]
    assert "loop: leads back to" in caplog.text

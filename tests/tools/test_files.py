"""Files that are complete or absent."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from spidr.tools.errors import InputError
from spidr.tools.files import atomic_write, check_file, expand, find_files, remove_unfinished


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
def test_other_errors_are_unchanged(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, atomic_write(tmp_path / "file"):  # noqa: PT012
        try:
            (tmp_path / "missing").read_bytes()
        except OSError:
            raise error from None
    assert caught.value is error


@pytest.mark.parametrize(
    "save",
    [
        lambda file: torch.save({"x": torch.zeros(100_000)}, file),
        lambda file: pl.DataFrame({"x": range(100_000)}).write_csv(file),
        lambda file: pl.DataFrame({"x": range(100_000)}).write_parquet(file),
    ],
)
def test_full_disk_while_a_library_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[[Any], object]
) -> None:
    """/dev/full is a real full disk."""
    opened = Path.open
    full = Path("/dev/full")
    monkeypatch.setattr(
        Path, "open", lambda self, *args, **kw: opened(full, "wb") if args == ("xb",) else opened(self, *args, **kw)
    )
    with (
        pytest.raises(InputError, match=r"No space left on device.*make room"),
        atomic_write(tmp_path / "x.pt") as file,
    ):
        save(file)


def test_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file or directory"), atomic_write(tmp_path / "none" / "file"):
        pass


def _write_for_ever(folder: Path, begun: Event) -> None:
    with atomic_write(folder / "x.pt"):
        begun.set()
        time.sleep(1000)


def test_only_leftovers_of_our_killed_processes_are_removed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    for _ in range(2):
        begun = context.Event()
        process = context.Process(target=_write_for_ever, args=(tmp_path, begun))
        process.start()
        assert begun.wait(200)
        others = {".notes.tmp", ".step_3.pt.77.tmp", "step_2.pt", ".spidr-.tmp"}
        for name in others:
            (tmp_path / name).touch()
        remove_unfinished(tmp_path)
        assert len(list(tmp_path.iterdir())) == len(others) + 1  # it is still being written
        process.kill()
        process.join()
        remove_unfinished(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == others


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "make room"), (errno.ENOENT, "the folder is missing"), (errno.EACCES, "that you may write to")],
)
def test_the_remedy_fits_the_cause(tmp_path: Path, number: int, remedy: str) -> None:
    with pytest.raises(InputError, match=remedy), atomic_write(tmp_path / "x"):
        raise OSError(number, os.strerror(number))


def test_a_missing_input_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"input\.csv"), atomic_write(tmp_path / "x"):
        (tmp_path / "input.csv").read_bytes()


def test_home_and_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert expand("~/a") == Path("/home/me/a")
    assert expand("${SCRATCH}/$SCRATCH.wav") == Path("/scratch//scratch.wav")
    assert expand("a/~b") == Path("a/~b")
    with pytest.raises(InputError, match="a path is empty"):
        expand("")
    with pytest.raises(InputError, match=r"variable \$NOT_SET is not set"):
        expand("$NOT_SET/a")
    with pytest.raises(InputError, match="no such user"):
        expand("~nobody-of-that-name/a")
    monkeypatch.chdir(tmp_path)
    Path("$price.wav").touch()
    assert expand("$price.wav") == Path("$price.wav")


def test_a_pipe_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe: cannot be read .it is a pipe or device, not a file"):
        check_file(tmp_path / "pipe")
    with pytest.raises(InputError, match="it is a folder"):
        check_file(tmp_path)
    with pytest.raises(InputError, match="No such file"):
        check_file(tmp_path / "none")


def test_links_are_followed_and_loops_detected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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

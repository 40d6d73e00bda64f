"""The log of a run, which leaves other loggers alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from spidr.tools.logging import run_log


def test_the_file_has_all_lines_from_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, root = logging.getLogger("spidr"), logging.getLogger()
    before = (list(package.handlers), package.level, package.propagate, list(root.handlers), root.level)
    with run_log(1, 2) as open_file:
        logging.getLogger("spidr.some.module").warning("early")
        open_file(tmp_path / "log_1.txt")
        logging.getLogger("spidr.some.module").info("late")
        logging.getLogger("other").warning("not ours")
    assert before == (list(package.handlers), package.level, package.propagate, list(root.handlers), root.level)
    lines = (tmp_path / "log_1.txt").read_text().splitlines()
    assert [line.partition("INFO")[2] or line.partition("WARNING")[2] for line in lines] == [
        " [rank 1] early", " [rank 1] late"
    ]  # fmt: skip
    printed = capsys.readouterr().err
    assert "early" in printed
    assert "late" not in printed  # only warnings, except on rank 0


def test_full_disk_does_not_flood_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with run_log(0) as open_file:
        open_file(Path("/dev/full"))
        for number in range(5):
            logging.getLogger("spidr").info("line %d", number)
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert "line 4" in printed

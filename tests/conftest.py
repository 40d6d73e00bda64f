"""Fixtures and hooks shared by all tests."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; the last bits of results depend on it

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.slurm_cluster import Cluster, missing_programs
from helpers.small_models import GOLDEN, GoldenCase
from helpers.web import Server, serving

# As in a terminal: programs that are started below `nohup`, or in the background of a script, ignore these two.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(params=["spidr-tiny", "dinosr-tiny"])
def golden(request: pytest.FixtureRequest) -> GoldenCase:
    return GoldenCase(GOLDEN / request.param)


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"SLURM is not installed: no {', '.join(missing)} (Debian: slurm-wlm and munge)")
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def cluster(started: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, as seen from the environment of this process."""
    for name in os.environ:
        if name.startswith(("SLURM", "SBATCH", "SPIDR")):
            monkeypatch.delenv(name)
    for name, value in started.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return started


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that accepts everything, first on the path."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\ncat > /dev/null\necho 12\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A web server on loopback, and an empty cache of models."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with serving() as server:
        yield server


@pytest.fixture
def cache(server: Server, tmp_path: Path) -> Path:
    return tmp_path / "hub" / "checkpoints"


ALLOWED_SKIPS = (
    "SLURM is not installed",
    "FFmpeg is not installed",
    "no GPU",
    "fastabx needs Python 3.12",
    "could not import 'discophon",
)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """In CI, a test skipped for an unexpected reason is a failure."""
    skipped = {report.nodeid: str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])}
    wanting = [test for test, reason in skipped.items() if "FFmpeg is not" in reason or "SLURM is not" in reason]
    if path := os.environ.get("SPIDR_TESTS_WANTING"):  # `.ci/run` installs what they need and runs them
        Path(path).write_text("\n".join(wanting), encoding="utf-8")
    reasons = set(skipped.values())
    unexpected = [reason for reason in reasons if not any(allowed in reason for allowed in ALLOWED_SKIPS)]
    if unexpected and os.environ.get("CI"):
        terminalreporter.write_line(f"skipped for reasons that are not allowed: {unexpected}", red=True)
        raise pytest.exit.Exception("unexpected skips", 1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run long tests only if selected by name or marker."""
    if config.option.markexpr or config.option.keyword:
        return
    for marker in ("slow", "versions", "published"):
        deselected = [item for item in items if item.get_closest_marker(marker)]
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]

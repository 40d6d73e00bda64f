"""Fixtures shared by all tests, and what holds for the suite as a whole."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it; results to the last bit depend on it

import pytest

from small_models import GOLDEN, GoldenCase


@pytest.fixture(params=["spidr-tiny", "dinosr-tiny"])
def golden(request: pytest.FixtureRequest) -> GoldenCase:
    return GoldenCase(GOLDEN / request.param)


ALLOWED_SKIPS = ("SLURM is not installed", "FFmpeg is not installed", "no GPU", "fastabx needs Python 3.12")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """In CI, a test that is skipped for a reason that nobody has thought of is a failure."""
    skipped = {report.nodeid: str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])}
    wanting = [test for test, reason in skipped.items() if "FFmpeg is not" in reason or "SLURM is not" in reason]
    terminalreporter.config.cache.set("spidr/wanting", wanting)  # `.ci/run` installs what they want and runs them
    reasons = set(skipped.values())
    unexpected = [reason for reason in reasons if not any(allowed in reason for allowed in ALLOWED_SKIPS)]
    if unexpected and os.environ.get("CI"):
        terminalreporter.write_line(f"skipped for reasons that are not allowed: {unexpected}", red=True)
        raise pytest.exit.Exception("unexpected skips", 1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long versions of tests run when they are asked for by name or marker."""
    if config.option.markexpr or config.option.keyword:
        return
    for marker in ("slow", "versions"):
        deselected = [item for item in items if item.get_closest_marker(marker)]
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]

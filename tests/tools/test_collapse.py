"""Warnings of collapsing codebooks."""

import logging

import pytest

from spidr.tools.collapse import CollapseWatch


def test_warns_once_until_it_recovers(caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch(share=0.1, steps=3, size=256)
    with caplog.at_level(logging.WARNING, "spidr"):
        for step, active in enumerate([25, 25, 26, 25, 25, 25, 25, 25, 200, 25, 25, 25], start=1):
            watch.step(step, ["l5", "l6"], [200, active], frames=100_000)
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(":")[0] for message in messages] == ["step 6", "step 12"]
    assert "layer 6 has used less than 10 % of its 256 codewords for 3 steps (now 25)" in messages[0]
    assert "model.codebook_revive_after" in messages[0]


def test_a_step_with_few_frames_gives_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch(share=0.5, steps=2, size=256)
    with caplog.at_level(logging.WARNING, "spidr"):
        for step in (1, 2, 3):
            watch.step(step, ["l1"], [5], frames=10)
        assert not caplog.records
        for step in (4, 5):
            watch.step(step, ["l1"], [4], frames=10)
    assert len(caplog.records) == 1

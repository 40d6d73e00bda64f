"""The summary of recordings that training does not use."""

import logging
import re
from pathlib import Path

import pytest

from spidr.config import DataConfig
from spidr.data import build_dataloader
from spidr.data.summary import DataSummary

CFG = {"num_workers": 0, "num_buckets": 1}


def summary(folder: Path, lengths: list[int], **settings: object) -> tuple[DataSummary, list[str]]:
    """A manifest of these lengths."""
    rows = "".join(f"/{i}.wav,{length}\n" for i, length in enumerate(lengths))
    (folder / "m.csv").write_text(f"path,num_samples\n{rows}")
    cfg = DataConfig(str(folder / "m.csv"), **CFG | settings)  # type: ignore[arg-type]
    found = build_dataloader(cfg, None).summary()
    return found, found.warnings(cfg)


def test_nothing_to_report(tmp_path: Path) -> None:
    found, warnings = summary(tmp_path, [160_000] * 10)
    assert found == DataSummary(10, 1_600_000 / 57_600_000, 1, 1_600_000 / 57_600_000)
    assert str(found) == "10 recordings, 1.67 min; an epoch hears 1.67 min in 1 batches"
    assert warnings == []


@pytest.mark.parametrize(
    ("lengths", "settings", "lost", "warning"),
    [
        ([1500] * 30 + [9000] * 2, {}, {"too_short": 30, "hours_too_short": 45_000}, "94 %.*min_sample_size = 2000"),
        ([1500] * 30 + [90_000] * 9, {}, {"too_short": 30, "hours_too_short": 45_000}, "77 % of the recordings"),
        ([160_000] * 20 + [2400], {}, {"hours_cropped": 20 * 157_600}, "98 %.*enable_padding"),
        ([160_000] * 20 + [2400], {"enable_padding": True}, {}, None),
        (
            [57_600_000] + [8000] * 3,
            {"enable_padding": True},
            {"hours_above_maximum": 57_280_000},
            "max_sample_size = 320000",
        ),
        ([16_000] * 99 + [15_999], {}, {"hours_cropped": 99}, None),
        ([320_000] * 8 * 11, {"drop_last": True}, {}, None),
    ],
)
def test_what_is_lost(
    tmp_path: Path, lengths: list[int], settings: dict[str, object], lost: dict[str, int], warning: str | None
) -> None:
    found, warnings = summary(tmp_path, lengths, **settings)
    hours = {name: n if name == "too_short" else n / 57_600_000 for name, n in lost.items()}
    total = sum(lengths) / 57_600_000
    used = total - sum(value for name, value in hours.items() if name.startswith("hours"))
    expected = DataSummary(len(lengths), total, found.batches, used, **hours)  # type: ignore[arg-type]
    for name, value in vars(expected).items():
        assert getattr(found, name) == pytest.approx(value), name
    assert len(warnings) == (warning is not None)
    assert all(str(amount) in str(found) for amount in [found.too_short] if amount)
    if warning is not None:
        assert re.search(warning, warnings[0])


def test_dropped_batches(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,num_samples\n" + "/a.wav,16000\n" * 7)
    cfg = DataConfig(str(tmp_path / "m.csv"), drop_last=True, max_sample_size=16_000, max_batch_length=16_000, **CFG)  # type: ignore[arg-type]
    loader = build_dataloader(cfg, None, rank=0, world_size=4)
    found = loader.summary()
    assert (found.batches, found.hours_dropped * 3600) == (4, pytest.approx(3))
    assert "drop_last = false" in found.warnings(cfg)[0]


def test_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found, warnings = summary(tmp_path, [1500] * 30 + [9000] * 2)
    found.log(logging.getLogger("spidr"), DataConfig("m"))
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert caplog.messages == [f"data: {found}", f"data: {warnings[0]}"]

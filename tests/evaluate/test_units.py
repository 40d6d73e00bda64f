"""Units paired with their recordings' phones, and DiscoPhon's metrics."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.synthetic import write_lines
from spidr.evaluate import evaluate_units, main
from spidr.evaluate.units import pair
from spidr.tools.errors import InputError


@pytest.fixture
def rows(tmp_path: Path) -> tuple[Path, Path]:
    """Units of 0.2 s, and alignments of equal length, 60 ms shorter, and 40 ms longer."""
    rng = np.random.default_rng(0)
    units = [{"fileid": name, "units": rng.integers(0, 200, 10).tolist()} for name in "abc"]
    phones = [
        {"fileid": "a", "phones": ["A", "B"] * 10},
        {"fileid": "b", "phones": ["A", "B"] * 7},
        {"fileid": "c", "phones": ["A", "B"] * 12},
    ]
    return write_lines(tmp_path / "u.jsonl", *units), write_lines(tmp_path / "p.jsonl", *phones)


def test_alignments_of_another_length(rows: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    """Filled with silence or cut, up to a tolerance, with a message."""
    data = pair(*rows).data
    assert [len(phones) for phones, _ in data.values()] == [20, 20, 20]
    assert list(data["b"][0][-6:]) == ["SIL"] * 6
    assert "2 alignments were filled with silence or cut, by at most 60 ms" in caplog.text
    with pytest.raises(InputError) as info:
        pair(*rows, tolerance=50)
    assert str(info.value) == (
        f"{rows[1]}: 1 recordings do not fit (--tolerance, --on-error skip):\n"
        "b: the alignment has 140 ms, the units 200 ms; are they of the same recording?"
    )
    assert list(pair(*rows, tolerance=50, skip=True).data) == ["a", "c"]
    assert "left out: b: the alignment has 140 ms" in caplog.text


def test_what_is_not_aligned(rows: tuple[Path, Path], tmp_path: Path) -> None:
    units, phones = rows
    write_lines(phones, {"fileid": "a", "phones": ["A", "B"] * 10}, {"fileid": "session.2", "phones": ["A"] * 20})
    with pytest.raises(InputError, match=r"(?m)2 of the 3 recordings of .*u\.jsonl are not aligned, such as b, c$"):
        pair(units, phones)
    assert list(pair(units, phones, skip=True).data) == ["a"]
    write_lines(phones, {"fileid": "x", "phones": ["A"]})
    with pytest.raises(InputError, match="fits no recording"):
        pair(units, phones, skip=True)


def test_the_size_of_the_codebook_is_as_recorded(
    rows: tuple[Path, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    units, phones = rows
    record = units.with_name("u.jsonl.json")
    assert evaluate_units(units, phones).bitrate == evaluate_units(units, phones, num_units=256).bitrate
    record.write_text(json.dumps({"kind": "units", "num_units": 500, "frame_seconds": 0.02}))
    caplog.clear()
    assert evaluate_units(units, phones) == evaluate_units(units, phones, num_units=500)
    monkeypatch.setenv("HOME", str(units.parent))
    assert evaluate_units("~/u.jsonl", phones) == evaluate_units(units, phones)
    assert "a codebook of" not in caplog.text
    with pytest.raises(InputError, match=r"u\.jsonl: was made with num_units = 500, not 256"):
        evaluate_units(units, phones, num_units=256)
    with pytest.raises(InputError, match=r"u\.jsonl: was made with frame_step = 20, not 10"):
        evaluate_units(units, phones, frame_step=10)
    with pytest.raises(InputError, match="num_units must be at least 1"):
        evaluate_units(units, phones, num_units=0)
    for seconds, message in ((0.0125, r"u\.jsonl: units of 12\.5 ms"), (0.0204, "20.4 ms")):
        record.write_text(json.dumps({"frame_seconds": seconds}))
        with pytest.raises(InputError, match=message):
            evaluate_units(units, phones)
    record.write_text("[")
    with pytest.raises(InputError, match=r"u\.jsonl\.json: how the frames were made cannot be read"):
        evaluate_units(units, phones)
    record.unlink()
    write_lines(units, {"fileid": "a", "units": list(range(90, 100))})
    assert pair(units, phones).num_units == 256
    assert "a codebook of 256 is assumed, but no unit is above 99: --num-units?" in caplog.text


def test_one_table_for_all_languages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files named as in DiscoPhon, with its alignments."""
    units, truth = tmp_path / "units", tmp_path / "discophon"
    (truth / "alignment").mkdir(parents=True)
    units.mkdir()
    for language, ids in (("deu", [0, 0, 1, 1]), ("swa", [0, 1, 0, 1])):
        write_lines(units / f"units-{language}-dev.jsonl", {"file": "f", "units": ids})
        table = "#file onset offset #phone\nf 0.0 0.04 a\nf 0.04 0.08 b\n"
        (truth / "alignment" / f"alignment-{language}-dev.txt").write_text(table)
    assert main(["units", str(units), str(truth), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(row["units"]).name for row in found] == ["units-deu-dev.jsonl", "units-swa-dev.jsonl"]
    assert [row["pnmi"] for row in found] == pytest.approx([1.0, 0.0])
    write_lines(units / "units-tam-test.jsonl", {"file": "f", "units": [1]})
    assert main(["units", str(units), str(truth)]) == 2
    assert "no alignment-tam-test.txt or the like for" in capsys.readouterr().err


def noisy_units(tmp_path: Path, num_units: int) -> tuple[Path, Path]:
    """Units that mostly identify the phone."""
    rng = np.random.default_rng(1)
    units, phones = [], []
    for name in "abcd":
        labels = rng.integers(0, 9, 60).repeat(rng.integers(2, 8, 60))
        noisy = np.where(rng.random(len(labels)) < 0.8, labels * 3, rng.integers(0, 30, len(labels))) % num_units
        units.append({"fileid": name, "units": noisy.tolist()})
        phones.append({"fileid": name, "phones": [f"p{label}" for label in labels.repeat(2)]})
    return write_lines(tmp_path / "u.jsonl", *units), write_lines(tmp_path / "p.jsonl", *phones)


@pytest.mark.parametrize("num_units", [30, 9, 4])
def test_discophon(tmp_path: Path, num_units: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Against discophon's own function, if it accepts the units."""
    discophon = pytest.importorskip("discophon.evaluate")
    paths = noisy_units(tmp_path, num_units)
    assert main(["units", *map(str, paths), "--discophon", "--num-units", str(num_units), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    data = pair(*paths, num_units=num_units).data
    units = {name: np.asarray(sequence).tolist() for name, (_, sequence) in data.items()}
    phones: dict[str, Any] = {name: labels for name, (labels, _) in data.items()}
    many = discophon.phoneme_discovery(units, phones, kind="many-to-one", n_units=num_units, n_phonemes=8)
    assert row["pnmi"] == pytest.approx(many["pnmi"], abs=1e-6)
    assert [row[key] for key in ("per_many_to_one", "boundary_f1", "r_value")] == [
        many[key] for key in ("per", "f1", "r_val")
    ]
    if num_units == 9:
        one = discophon.phoneme_discovery(units, phones, kind="one-to-one", n_units=9, n_phonemes=8)
        assert row["per_one_to_one"] == one["per"]
    assert row["per_many_to_one"] <= row["per_one_to_one"] or num_units == 4


def test_discophon_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "discophon", None)
    monkeypatch.setitem(sys.modules, "discophon.evaluate", None)
    assert main(["units", *map(str, noisy_units(tmp_path, 30)), "--discophon"]) == 2
    assert "`discophon` is missing: install it with `pip install 'spidr[discophon]'`" in capsys.readouterr().err

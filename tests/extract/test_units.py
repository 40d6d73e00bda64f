"""Tables of units."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import spidr
from helpers.extraction import LAYER, PROMPTS, QUIET, noise, read
from spidr.extract import extract_units
from spidr.extract.__main__ import main
from spidr.models import DinoSR
from spidr.tools.errors import InputError


def test_units_in_tables(model: DinoSR, checkpoint: Path, tmp_path: Path) -> None:
    files = sorted(PROMPTS.iterdir())[:5]
    expected = {file.stem: model.units(read(file).unsqueeze(0), layer=LAYER)[0][0].tolist() for file in files}
    for suffix in ("jsonl", "parquet"):
        plain, merged = tmp_path / f"plain.{suffix}", tmp_path / f"merged.{suffix}"
        common = [*map(str, files), "--model", str(checkpoint), "--layer", "3", "--quiet"]
        assert main(["units", *common[:5], str(plain), *common[5:]]) == 0
        assert main(["units", *common[:5], str(merged), *common[5:], "--dedup"]) == 0
        table, runs = (pl.read_ndjson(p) if suffix == "jsonl" else pl.read_parquet(p) for p in (plain, merged))
        assert table.columns == ["fileid", "units"]
        assert dict(table.iter_rows()) == expected
        assert runs.columns == ["fileid", "units", "durations"]
        for name, found, durations in runs.iter_rows():
            assert found == [unit for unit, _ in groupby(found)]
            assert np.repeat(found, durations).tolist() == expected[name]
        record = json.loads(plain.with_name(f"{plain.name}.json").read_text())
        assert (record["layer"], record["spidr"]) == (LAYER, spidr.__version__)
        if suffix == "parquet":
            assert json.loads(pl.read_parquet_metadata(plain)["spidr"]) == record
        plain.with_name(f"{plain.name}.json").unlink()
        with pytest.raises(InputError, match=r"no plain\.(jsonl|parquet)\.json says how it was made"):
            extract_units(files, plain, model=checkpoint, layer=LAYER, options=QUIET)


def test_damaged_parquet(checkpoint: Path, tmp_path: Path) -> None:
    file, out = noise(tmp_path / "a.wav"), tmp_path / "u [1].parquet"
    extract_units(file, out, model=checkpoint, layer=LAYER, options=QUIET)
    extract_units(file, out, model=checkpoint, layer=LAYER, options=QUIET)
    whole = out.read_bytes()
    for damaged in (b"", whole[:100], whole[:50] + bytes(100) + whole[150:], bytes(len(whole))):
        out.write_bytes(damaged)
        with pytest.raises(InputError, match=r"u \[1\]\.parquet: cannot be read \(.*\)\. Remove it\.$"):
            extract_units(file, out, model=checkpoint, layer=LAYER, options=QUIET)
    out.unlink()
    extract_units(file, out, model=checkpoint, layer=LAYER, options=QUIET)
    assert pl.read_parquet(out.open("rb"))["fileid"].to_list() == ["a"]

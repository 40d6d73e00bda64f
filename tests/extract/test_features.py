"""Features in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spidr
from helpers.extraction import LAYER, QUIET, noise, read
from spidr.extract import extract_features
from spidr.extract.__main__ import main
from spidr.models import DinoSR
from spidr.tools.errors import InputError


def test_features_in_files(model: DinoSR, checkpoint: Path, tmp_path: Path) -> None:
    noise(tmp_path / "audio" / "a.wav")
    exact = model.encode(read(tmp_path / "audio" / "a.wav").unsqueeze(0), layer=LAYER)[0][0]
    for file_format, stored in (("npy", "float32"), ("npy", "float16"), ("pt", "float32"), ("pt", "float16")):
        out = tmp_path / file_format / stored
        arguments = [
            "features",
            str(tmp_path / "audio"),
            str(out),
            "--model",
            str(checkpoint),
            "--layer",
            "3",
            "--quiet",
        ]
        assert main([*arguments, "--format", file_format, "--store", stored]) == 0
        file = out / f"a.{file_format}"
        found = torch.load(file) if file_format == "pt" else torch.from_numpy(np.load(file))
        assert torch.equal(found, exact.to(getattr(torch, stored)))
        record = json.loads((out / "extract.json").read_text())
        assert record["model"] == str(checkpoint)
        assert (record["layer"], record["spidr"], record["stored"]) == (LAYER, spidr.__version__, stored)


@pytest.mark.parametrize("flat", [False, True])
def test_a_name_that_is_too_long_for_a_file(flat: bool, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(f"fileid,path,num_samples\n{'x' * 300},{noise(tmp_path / 'a.wav')},8000\n")
    noise(tmp_path / "b.wav")
    common: Any = {"model": checkpoint, "layer": LAYER, "flat": flat, "options": QUIET}
    if not flat:  # then it is named by its path
        assert extract_features(tmp_path / "m.csv", tmp_path / "f", **common) == {}
        return
    with pytest.raises(InputError, match=r"xxx\.npy: cannot be written \(File name too long\)"):
        extract_features(tmp_path / "m.csv", tmp_path / "f", **common)

"""Units by k-means."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.extraction import PROMPTS, QUIET, noise, read, units
from spidr.extract import Options, extract_units, fit_kmeans, kmeans
from spidr.extract.__main__ import main
from spidr.models import DinoSR
from spidr.tools.errors import InputError


def test_kmeans(model: DinoSR, checkpoint: Path, tmp_path: Path) -> None:
    files = sorted(PROMPTS.iterdir())[:30]
    batched = Options(batch_seconds=30, progress=False)
    for name, options in (("a", QUIET), ("b", QUIET)):
        fit_kmeans(
            files, tmp_path / f"{name}.npz", model=checkpoint, layer=2, units=10, max_frames=5000, options=options
        )
    assert (tmp_path / "a.npz").read_bytes()[:4] == b"PK\x03\x04"
    with np.load(tmp_path / "a.npz", allow_pickle=False) as a, np.load(tmp_path / "b.npz", allow_pickle=False) as b:
        np.testing.assert_array_equal(a["centroids"], b["centroids"])
        centroids, made = a["centroids"], json.loads(str(a["made"]))
    assert centroids.shape == (10, 32)
    assert made["layer"] == 2
    assert 4000 < made["frames"] <= 5000
    for name, options in (("alone", QUIET), ("batched", batched)):
        out = tmp_path / f"{name}.jsonl"
        extract_units(files, out, model=checkpoint, kmeans=tmp_path / "a.npz", options=options)
        found, inertia = units(out), 0.0
        for file in files:
            features = model.encode(read(file).unsqueeze(0), layer=2)[0][0].double().numpy()
            distances = ((features[:, None] - centroids) ** 2).sum(-1)
            chosen = distances[np.arange(len(features)), found[file.stem]]
            np.testing.assert_allclose(chosen, distances.min(-1), rtol=1e-5)
            inertia += distances.min(-1).mean()
        assert set().union(*found.values()) == set(range(10))
    assert (tmp_path / "alone.jsonl").read_bytes() == (tmp_path / "batched.jsonl").read_bytes()
    with pytest.raises(InputError, match="the centroids are of layer 2 of"):
        extract_units(files, tmp_path / "x.jsonl", model=checkpoint, layer=3, kmeans=tmp_path / "a.npz", options=QUIET)
    with pytest.raises(InputError, match=r"^units: found 1000000000, expected 2 to 1,048,576$"):
        fit_kmeans(files, tmp_path / "c.npz", model=checkpoint, units=10**9, max_frames=10**10, options=QUIET)
    with pytest.raises(InputError, match=r"^units: found 1, expected 2 to 1,048,576$"):
        fit_kmeans(files, tmp_path / "c.npz", model=checkpoint, units=1, options=QUIET)
    with pytest.raises(InputError, match=r"^max_frames: found 9, expected 10 at least, a frame for each unit$"):
        fit_kmeans(files, tmp_path / "c.npz", model=checkpoint, units=10, max_frames=9, options=QUIET)
    (tmp_path / "years.csv").write_text(f"fileid,path,num_samples\na,{files[0]},{10**14}\n")
    with pytest.raises(InputError, match=r"^1000000000000 frames: would take .* GiB"):
        fit_kmeans(
            tmp_path / "years.csv", tmp_path / "c.npz", model=checkpoint, layer=2, max_frames=10**12, options=QUIET
        )
    with pytest.raises(InputError, match="frames are too few for 4000 units: give more recordings"):
        fit_kmeans(files[:1], tmp_path / "c.npz", model=checkpoint, layer=2, units=4000, options=QUIET)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04")
    np.savez(tmp_path / "flat.npz", centroids=centroids[0], made=json.dumps(made))
    np.savez(tmp_path / "one.npz", centroids=centroids[:1], made=json.dumps(made))
    for name, reason in (
        ("bad", ""),
        ("flat", "not a matrix of finite numbers"),
        ("one", "there are fewer than two centroids"),
    ):
        with pytest.raises(InputError, match=rf"{name}\.npz: no k-means model .*{reason}"):
            extract_units(files, tmp_path / "x.jsonl", model=checkpoint, kmeans=tmp_path / f"{name}.npz", options=QUIET)


def test_kmeans_of_recordings_that_cannot_be_encoded(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).write_bytes(b"no recording")
    options = Options(on_error="skip", progress=False)
    with pytest.raises(InputError, match=r"^none of 2 recordings could be encoded, the first one for this: .*a\.wav"):
        fit_kmeans(tmp_path, tmp_path / "k.npz", model=checkpoint, layer=2, units=2, options=options)


def test_kmeans_with_too_few_frames_chosen(checkpoint: Path, tmp_path: Path) -> None:
    files = [noise(tmp_path / f"{i}.wav", 160_000, seed=i) for i in range(2)]
    for seed in range(10):  # of 998 frames, about 100 are drawn
        try:
            fit_kmeans(
                files,
                tmp_path / "k.npz",
                model=checkpoint,
                layer=2,
                units=100,
                max_frames=100,
                seed=seed,
                options=QUIET,
            )
        except InputError as error:
            assert re.fullmatch(r"\d\d frames are too few for 100 units: raise max_frames \(100\)", str(error))  # noqa: PT017
            return
    pytest.fail("never too few")


def test_the_draw_of_frames_does_not_depend_on_the_order() -> None:
    recordings = {f"{i}": np.arange(1000, dtype=np.float32)[:, None] + 1000 * i for i in range(20)}
    found = []
    for names in (list(recordings), list(recordings)[::-1]):
        draw, most = kmeans._Draw(500, 1.0, 0), 0
        for name in names:
            draw.add(name, recordings[name])
            most = max(most, draw.count)
        draw.reduce()
        assert most <= 625
        assert draw.count == 500
        found.append({name: frames.tolist() for name, (_, frames) in draw.drawn.items()})
    assert found[0] == found[1]
    assert all(5 < len(frames) < 60 for frames in found[0].values())


def test_without_scikit_learn(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sklearn", "sklearn.cluster"):
        monkeypatch.setitem(sys.modules, name, None)
    file, out = noise(tmp_path / "a.wav"), tmp_path / "k.npz"
    assert main(["kmeans", str(file), str(out), "--model", str(checkpoint), "--layer", "3"]) == 2
    assert capsys.readouterr().err == "error: `sklearn` is missing: install it with `pip install 'spidr[extract]'`\n"

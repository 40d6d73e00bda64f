"""Weights as others save them, what is refused, and hostile files."""

import json
import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.fairseq import fairseq_checkpoint
from helpers.weights import FAIRSEQ, SPIDR, random_weights, same_weights
from spidr.export import export_safetensors
from spidr.models import DinoSR, SpidR, build_model
from spidr.models.fairseq import load_fairseq_weights
from spidr.models.weights import load_into, read_weights
from spidr.tools.errors import InputError


class AttributeDict(dict):
    """Like Lightning's class for hyperparameters, which must not be unpickled."""


def wrapped(kind: str, weights: dict[str, Tensor]) -> Any:
    """Weights as other programs save them."""
    prefixed = {f"model.{name}": value for name, value in weights.items()}
    return {
        "bare": weights,
        "under model": {"model": weights, "step": 12, "optimizer": {"a": [1]}},
        "under state_dict": {"state_dict": weights},
        "ddp": {"model": {f"module.{name}": value for name, value in weights.items()}},
        "compiled": {"model": {f"_orig_mod.{name}": value for name, value in weights.items()}},
        "ddp of compiled": {f"module._orig_mod.{name}": value for name, value in weights.items()},
        "compiled of ddp": {f"_orig_mod.module.{name}": value for name, value in weights.items()},
        "compiled student": {name.replace("student.", "student._orig_mod."): value for name, value in weights.items()},
        "lightning": {"state_dict": prefixed, "hyper_parameters": AttributeDict(lr=1e-3), "callbacks": {}, "epoch": 3},
        "lightning, compiled": {"state_dict": {f"net._orig_mod.{name}": value for name, value in weights.items()}},
        "of a larger model": prefixed | {"classifier.weight": torch.ones(2, 3)},
        "averaged": {f"module.{name}": value for name, value in weights.items()} | {"n_averaged": torch.tensor(3)},
        "parameters": {name: nn.Parameter(value, requires_grad=False) for name, value in weights.items()},
    }[kind]


KINDS = [
    "bare", "under model", "under state_dict", "ddp", "compiled", "ddp of compiled", "compiled of ddp",
    "compiled student", "lightning", "lightning, compiled", "of a larger model", "averaged", "parameters",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_as_others_save_them(tmp_path: Path, kind: str) -> None:
    weights = random_weights(SpidR(SPIDR))
    torch.save(wrapped(kind, weights), tmp_path / "x.pt")
    model = SpidR(SPIDR)
    load_into(model, read_weights(tmp_path / "x.pt"), "x.pt")
    assert same_weights(model, weights)


def test_old_format(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = random_weights(SpidR(SPIDR))
    torch.save({"model": weights}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "x.pt").keys() == weights.keys()
    assert f"{tmp_path / 'x.pt'}: an old file format without a checksum" in caplog.text


def test_two_models_in_one_file(tmp_path: Path) -> None:
    """Ambiguous, unless one is at the top level."""
    weights = random_weights(SpidR(SPIDR))
    two = {f"{name}.{key}": value for name in ("a", "b") for key, value in weights.items()}
    torch.save(two, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt: .*weights of several models: a\.mask_embedding, b\.mask_embedding"):
        read_weights(tmp_path / "x.pt")
    model = SpidR(SPIDR)
    torch.save(weights | two, tmp_path / "x.pt")
    load_into(model, read_weights(tmp_path / "x.pt"), "x.pt")
    assert same_weights(model, weights)


def test_foreign_weights_are_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = random_weights(SpidR(SPIDR))
    foreign = {f"supervised_classifiers.{i}.weight": torch.ones(3) for i in range(9)}
    model = SpidR(SPIDR)
    load_into(model, weights | foreign, "x.pt")
    assert same_weights(model, weights)
    first = ", ".join(list(foreign)[:5])
    assert caplog.messages == [f"x.pt: left out: of no part of the model: {first} and 4 more"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    model = SpidR(SPIDR)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = random_weights(model)
    weights["student.layers.1.feed_forward.output_dense.weight"][3, 5] = value
    with pytest.raises(InputError, match=r"^x\.pt: weights that are not finite: student\.layers\.1\.feed_forward\.out"):
        load_into(model, weights, "x.pt")
    assert same_weights(model, before)


def test_huge_weights_give_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    weights = random_weights(SpidR(SPIDR))
    weights["heads.0.0.bias"][1] = -1e30
    load_into(SpidR(SPIDR), weights, "x.pt")
    assert caplog.messages == ["x.pt: weights above 1e+10: heads.0.0.bias. Has this run diverged?"]


def test_mismatches_are_named() -> None:
    """A model is changed completely or not at all."""
    model = SpidR(SPIDR)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = random_weights(model)
    weights["heads.extra"] = weights.pop("mask_embedding")
    weights["heads.1.0.bias"] = torch.zeros(6)
    weights["else"] = torch.zeros(6)
    with pytest.raises(InputError) as info:
        load_into(model, weights, "x.pt")
    assert str(info.value) == (
        "x.pt: not the weights of this SpidR: missing: mask_embedding; unknown: heads.extra; "
        "of another shape: heads.1.0.bias (found (6,), expected (5,)); of no part of the model: else"
    )
    assert same_weights(model, before)
    many = {f"heads.x{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(InputError, match=r"unknown: heads.x0, heads.x1, heads.x2, heads.x3, heads.x4 and 4 more"):
        load_into(model, before | many, "here")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>Sign in to the network</html>", "no checkpoint"),
        (b"", "no checkpoint"),
        ({"weights": {}}, "expected a dictionary of weights, perhaps under 'model' or 'state_dict'"),
        ([1, 2], "expected a dictionary of weights"),
        ({"model": {}}, "expected a dictionary of weights"),
        ({"model": {"mask_embedding": torch.ones(1), "b": 3}}, "expected only tensors, found a int at b"),
    ],
)
def test_wrong_content(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match=rf"^{path}: .*{message}"):
        read_weights(path)


# ---------------------------------------------------------------------------------------------------------- safetensors


def test_a_changed_byte_in_an_export_is_detected(tmp_path: Path) -> None:
    path, rng = tmp_path / "x.safetensors", np.random.default_rng(0)
    export_safetensors(build_model(cfg=SPIDR), path)
    content = path.read_bytes()
    read_weights(path)
    for position in rng.integers(8, len(content), 40):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"^.*x\.safetensors: "):
            read_weights(path)


def test_other_files_have_no_checksum(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = random_weights(SpidR(SPIDR))
    save_file(weights, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "spidr", "model": asdict(SPIDR)}))
    with caplog.at_level(logging.WARNING):
        assert same_weights(build_model(tmp_path / "x.safetensors"), weights)
    assert "x.safetensors: has no checksum" in caplog.text


# -------------------------------------------------------------------------------------------------- hostile files


@pytest.mark.parametrize("load", [read_weights, load_fairseq_weights])
def test_any_damage_gives_one_clear_error(tmp_path: Path, load: Callable[[Path], Any]) -> None:
    path, rng = tmp_path / "x.pt", np.random.default_rng(0)
    torch.save(
        fairseq_checkpoint(random_weights(DinoSR(FAIRSEQ)))
        if load is not read_weights
        else {"model": random_weights(DinoSR(FAIRSEQ)), "step": 3},
        path,
    )
    content = path.read_bytes()
    expected = load(path)
    refused = 0
    for position in rng.integers(0, len(content), 60):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.integers(8)
        for bad in (bytes(damaged), content[:position]):
            path.write_bytes(bad)
            try:
                again = load(path)
            except InputError as error:
                refused += 1
                assert str(error).startswith(f"{path}: ")  # noqa: PT017
            else:  # the bit was in padding, or in a date
                assert list(again) == list(expected)
                assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert refused > 90


def test_no_file(tmp_path: Path) -> None:
    for load in (read_weights, load_fairseq_weights):
        with pytest.raises(InputError, match=r"x\.pt: cannot be read \(No such file or directory\)"):
            load(tmp_path / "x.pt")
        with pytest.raises(InputError, match=r"cannot be read \(it is a folder, not a file\)"):
            load(tmp_path)
        with pytest.raises(InputError, match=r"cannot be read \(it is a pipe or device, not a file\)"):
            load(Path(os.devnull))


def test_compressed_archive(tmp_path: Path) -> None:
    """torch.save never compresses, so a compressed file may be a bomb."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"model": bytes(10_000_000)}, protocol=2))
    for load in (read_weights, load_fairseq_weights):
        with pytest.raises(InputError, match="entries that are compressed"):
            load(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["meta", "nested", "sparse"])
def test_tensors_that_are_not_weights(tmp_path: Path, kind: str) -> None:
    odd = {
        "meta": torch.empty(3, device="meta"),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "sparse": torch.eye(3).to_sparse(),
    }
    torch.save({"model": {"heads.0.0.bias": odd[kind]}}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match=r"odd\.pt: damaged or no checkpoint \(expected only plain tensors"):
        read_weights(tmp_path / "odd.pt")

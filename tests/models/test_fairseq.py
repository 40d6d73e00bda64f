"""fairseq's checkpoints, made of the objects that fairseq saves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.fairseq import fairseq_checkpoint
from helpers.weights import FAIRSEQ, random_weights, same_weights
from spidr.models import DinoSR
from spidr.models.fairseq import load_fairseq_weights
from spidr.models.weights import load_into
from spidr.tools.errors import InputError


def load(path: Path) -> DinoSR:
    model = DinoSR(FAIRSEQ)
    load_into(model, load_fairseq_weights(path), path)
    return model


@pytest.mark.parametrize("step", [77, torch.tensor(77), torch.tensor([77.0]), np.int64(77)])
def test_fairseq(tmp_path: Path, step: Any) -> None:
    weights = random_weights(DinoSR(FAIRSEQ))
    torch.save(fairseq_checkpoint(weights, step), tmp_path / "x.ckpt")
    if isinstance(step, np.int64):  # an inert object, like every numpy object
        weights["current_step"] = torch.tensor([0])
    assert same_weights(load(tmp_path / "x.ckpt"), weights)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(tmp_path: Path, protocol: int) -> None:
    weights = random_weights(DinoSR(FAIRSEQ))
    torch.save(fairseq_checkpoint(weights), tmp_path / "x.ckpt", pickle_protocol=protocol)
    assert same_weights(load(tmp_path / "x.ckpt"), weights)


def test_half_precision_and_shared_storage(tmp_path: Path) -> None:
    checkpoint = fairseq_checkpoint(random_weights(DinoSR(FAIRSEQ)))
    half = {name: value.half() for name, value in checkpoint["model"]["_ema"].items()}
    checkpoint["model"]["_ema"] = half
    checkpoint["model"]["mask_emb"] = torch.randn(3, 2 * 16)[1, ::2]  # a view with an offset and a stride
    torch.save(checkpoint, tmp_path / "x.ckpt")
    model = load(tmp_path / "x.ckpt")
    assert torch.equal(model.mask_embedding, checkpoint["model"]["mask_emb"])
    assert torch.equal(model.teacher.layer_norm.bias, half["layer_norm.bias"].float())
    assert model.teacher.layer_norm.bias.dtype == torch.float32


def test_without_optimizer(tmp_path: Path) -> None:
    checkpoint = fairseq_checkpoint(random_weights(DinoSR(FAIRSEQ)))
    for state in ({}, {"state": {}}, {"state": {0: {}}}, None):
        torch.save(checkpoint | {"last_optimizer_state": state}, tmp_path / "x.ckpt")
        assert load_fairseq_weights(tmp_path / "x.ckpt")["current_step"].tolist() == [0]


def test_mismatches(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    checkpoint = fairseq_checkpoint(random_weights(DinoSR(FAIRSEQ)))
    del checkpoint["model"]["encoder.layers.1.self_attn.k_proj.weight"]
    checkpoint["model"]["decoder.weight"] = torch.zeros(1)
    torch.save(checkpoint, path)
    with pytest.raises(InputError) as info:
        load(path)
    assert "missing: student.layers.1.attention.qkv.weight;" in str(info.value)
    assert "decoder.weight" in str(info.value)
    for broken in (
        {"model": {}},
        {"model": {"_ema": 3}},
        [1],
        {"model": {"_ema": {}, "a": np.zeros(3)}},
        {"model": {"_ema": {}, "a": 3}},
    ):
        torch.save(broken, path)
        with pytest.raises(InputError, match=r"x\.ckpt: damaged or no checkpoint \(expected"):
            load_fairseq_weights(path)

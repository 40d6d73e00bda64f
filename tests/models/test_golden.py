"""Both models against values recorded on a working system."""

import json

import pytest
import torch

from helpers.small_models import GOLDEN, GoldenCase
from spidr.config import DinoSRConfig, SpidRConfig
from spidr.models import DinoSR, SpidR


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture
def attention_mask(golden: GoldenCase) -> torch.Tensor:
    return golden.tensors["attention_mask_keys"][:, None, None]


@torch.no_grad()
def test_eval_outputs(golden: GoldenCase, attention_mask: torch.Tensor) -> None:
    model, expected = golden.model().eval(), golden.tensors["eval"]
    waveforms = golden.tensors["waveforms"]
    features, _ = model.project(waveforms)
    close(features, expected["projected_features"])
    close(model.student(features, attention_mask), expected["student_forward"])
    teacher = model.teacher.get_intermediate_outputs(features, attention_mask)
    close(torch.stack(teacher), expected["teacher_before_residual"])
    before = model.get_intermediate_outputs(waveforms, attention_mask=attention_mask)
    close(torch.stack(before), expected["intermediate_before_residual"])
    after = model.get_intermediate_outputs(waveforms, attention_mask=attention_mask, before_residual=False)
    close(torch.stack(after), expected["intermediate_after_residual"])
    close(torch.stack(model.get_intermediate_outputs(waveforms[:1])), expected["single_intermediate"])
    codebooks = model.get_codebooks(waveforms, attention_mask=attention_mask)
    assert codebooks[:1] == [None]
    close(torch.stack(codebooks[1:]), expected["codebook_probs"])


@pytest.mark.parametrize("form", ["keys", "dense", "lengths"])
@torch.no_grad()
def test_every_way_to_say_what_is_padded(golden: GoldenCase, attention_mask: torch.Tensor, form: str) -> None:
    model, expected = golden.model().eval(), golden.tensors["eval"]
    num_frames = attention_mask.shape[-1]
    given = {
        "keys": {"attention_mask": attention_mask},
        "dense": {"attention_mask": attention_mask.expand(-1, 1, num_frames, num_frames)},
        "lengths": {"lengths": golden.tensors["lengths"]},
    }[form]
    outputs = model.get_intermediate_outputs(golden.tensors["waveforms"], **given)
    close(torch.stack(outputs), expected["intermediate_before_residual"])


@pytest.mark.parametrize("form", ["boolean", "indices"])
@torch.no_grad()
def test_masked_loss(golden: GoldenCase, attention_mask: torch.Tensor, form: str) -> None:
    model, expected = golden.model().eval(), golden.tensors["eval"]
    mask = golden.tensors["masks"][0]
    assert mask.sum() == len(expected["loss_per_frame"])
    if form == "indices":
        assert len(mask.sum(1).unique()) == 1  # the same number in every row
        mask = mask.nonzero()[:, 1].view(len(mask), -1)
    loss, outputs = model(golden.tensors["waveforms"], mask=mask, attention_mask=attention_mask)
    close(loss, expected["loss_per_frame"])
    for name in ("target_ppl", "pred_ppl"):
        assert outputs[name].shape == ()
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-5, atol=0)


def test_six_training_steps_through_the_public_loop(golden: GoldenCase, attention_mask: torch.Tensor) -> None:
    """The published way to train, with PyTorch's plain AdamW and the measured learning rates."""
    model, optimizer_cfg = golden.model().train(), golden.trajectory["optimizer"]
    parameters = [p for name, p in model.named_parameters() if not name.startswith("teacher")]
    optimizer = torch.optim.AdamW(
        parameters, betas=optimizer_cfg["betas"], eps=optimizer_cfg["eps"], weight_decay=optimizer_cfg["weight_decay"]
    )
    for i, expected in enumerate(golden.trajectory["steps"]):
        optimizer.param_groups[0]["lr"] = expected["lr"]
        waveforms, mask = golden.tensors["train_waveforms"][i], golden.tensors["masks"][i]
        loss, outputs = model(waveforms, mask=mask, attention_mask=attention_mask)
        loss.mean().backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, optimizer_cfg["max_norm"])
        optimizer.step()
        optimizer.zero_grad()
        decay = model.update_ema(i + 1)
        assert loss.mean().item() == pytest.approx(expected["loss"], rel=1e-4)
        assert grad_norm.item() == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert decay == pytest.approx(expected["ema_decay"], rel=1e-12)
        for name in ("target_ppl", "pred_ppl"):
            assert outputs[name].item() == pytest.approx(expected[name], rel=1e-4)
    after = golden.weights("checkpoint_after.pt")
    state = model.state_dict()
    assert list(state) == list(after)
    for name, value in after.items():
        # Codebooks hold sums of standardised features, whose rounding error grows with their size.
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_state_dict_round_trip(golden: GoldenCase) -> None:
    weights, state = golden.weights(), golden.model().state_dict()
    assert list(state) == list(weights)
    for name, value in weights.items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value)


@pytest.mark.parametrize(
    ("name", "model", "cfg"),
    [
        ("spidr_base", SpidR, SpidRConfig()),
        ("spidr_base", DinoSR, DinoSRConfig()),  # the reproduced DinoSR has the same names and shapes
        ("dinosr_base_original", DinoSR, DinoSRConfig(encoder_qkv_bias=True)),
    ],
)
def test_names_and_shapes_of_the_published_models(name: str, model: type[DinoSR], cfg: DinoSRConfig) -> None:
    expected = json.loads((GOLDEN / "state_dict_keys.json").read_text())[name]
    state = model(cfg).state_dict()
    assert list(state) == list(expected)
    for key, value in state.items():
        assert list(value.shape) == expected[key]["shape"]
        assert str(value.dtype) == f"torch.{expected[key]['dtype']}"

"""Changes to a submodule have the same effect as in the published package."""

import copy
import json
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.changes import calls, changes, measure, prepare
from helpers.small_models import GOLDEN, GoldenCase, tiny_model
from spidr.models import DinoSR
from spidr.models.kernels import untouched

EXPECTED = json.loads((GOLDEN / "changes.json").read_text())


def test_every_change_has_its_effect(golden: GoldenCase) -> None:
    """Hooks, replacements, parametrisations, pruning, adapters, strides: features, units, loss and gradient."""
    model = prepare(golden.model())
    waveforms, expected = golden.tensors["waveforms"], EXPECTED[golden.folder.name]["outcomes"]
    done = {"unchanged"}
    torch.testing.assert_close(measure(copy.deepcopy(model), waveforms), expected["unchanged"], rtol=5e-4, atol=0)
    for name, path, change in changes(model):
        key = f"{name} {path}"
        if key in expected:
            changed = copy.deepcopy(model)
            change(changed, path)
            found = measure(changed, waveforms)
            torch.testing.assert_close(found, expected[key], rtol=5e-4, atol=0, msg=f"{key}: {found}, {expected[key]}")
            done.add(key)
    assert done == expected.keys()


def test_every_module_is_called_as_often_with_the_same_shapes(golden: GoldenCase) -> None:
    found = calls(prepare(golden.model()).train(), golden.tensors["waveforms"])
    expected = EXPECTED[golden.folder.name]["calls"]
    assert {path: found.get(path) for path in expected} == expected


def loss_of(model: DinoSR) -> Tensor:
    frames = model.feature_extractor.num_frames(1500)
    return model(torch.randn(2, 1500), mask=(torch.arange(frames) % 2 == 0).expand(2, frames))[0].mean()


def test_backward_hooks_are_called_once() -> None:
    model, seen = tiny_model().train(), Counter[str]()
    for path, module in model.named_modules():
        module.register_full_backward_hook(lambda *_, path=path: seen.update([path]))
    loss_of(model).backward()
    for path in ("feature_extractor.conv_layers.0.conv", "student.layers.1.feed_forward.output_dense", "heads.2.0"):
        assert seen[path] == 1, path


def test_global_hooks_are_called() -> None:
    model, seen = tiny_model().train(), Counter[type]()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.update([type(module)]))
    try:
        loss_of(model)
    finally:
        handle.remove()
    assert seen[nn.Conv1d] == len(model.feature_extractor.conv_layers) + 2 * len(model.student.pos_conv_embed.convs)
    assert seen[type(model.codebooks[0])] == seen[nn.LogSoftmax] == 3


def test_dynamic_quantisation() -> None:
    model = tiny_model().eval()
    waveforms = torch.randn(2, 1500)
    with pytest.warns(DeprecationWarning, match="quantization"):
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        exact, found = model.get_codebooks(waveforms)[-1], quantised.get_codebooks(waveforms)[-1]
        assert not torch.equal(exact, found)
        assert not [name for name, module in quantised.named_modules() if isinstance(module, nn.Linear)]
        torch.testing.assert_close(found, exact, rtol=0, atol=0.05)
        assert quantised.units(waveforms, layer=3)[0].shape == found.shape[:2]


class ZeroWeight(Tensor):
    """A weight that defines its own products, like quantised weights."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            return args[0].new_zeros(*args[0].shape[:-1], len(args[1]))
        return super().__torch_function__(function, types, args, kwargs)


def test_weights_of_another_type() -> None:
    model = tiny_model().eval()
    linear = model.heads[0][0]
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(ZeroWeight), requires_grad=False)
    with torch.no_grad():
        probabilities = model.get_codebooks(torch.randn(1, 1500))[1]
    torch.testing.assert_close(probabilities, torch.full_like(probabilities, 1 / 12))


@pytest.mark.parametrize("first", [False, True], ids=["after a call", "before any call"])
def test_a_changed_stride_changes_lengths_too(first: bool) -> None:
    model = tiny_model().eval()
    waveforms, lengths = torch.randn(2, 3000), [3000, 1700]
    before = None if first else model.encode(waveforms, lengths, layer=2)[1]
    model.feature_extractor.conv_layers[-1].conv.stride = (1,)
    features, frames = model.encode(waveforms, lengths, layer=2)
    assert features.shape[1] == frames[0] == model.feature_extractor.num_frames(3000)
    if before is not None:
        assert (frames >= 2 * before - 1).all()
    alone, _ = model.encode(waveforms[1:, :1700], layer=2)
    torch.testing.assert_close(features[1:, : frames[1]], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrapped", ["feature_extractor.conv_layers.0", "feature_extractor.conv_layers.0.layer_norm"])
def test_lengths_keep_padding_out_of_a_wrapped_group_norm(wrapped: str) -> None:
    model = tiny_model(extractor_mode="group_norm").eval()
    plain = copy.deepcopy(model)
    parent, _, name = wrapped.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Sequential(model.get_submodule(wrapped)))
    waveforms, lengths = torch.randn(2, 3000), [3000, 1700]
    for model_ in (model, plain):
        model_.student.layers[0].register_forward_hook(lambda *_: None)
    found, frames = model.encode(waveforms, lengths, layer=2)
    expected, _ = plain.encode(waveforms, lengths, layer=2)
    for row, count in enumerate(frames):
        torch.testing.assert_close(found[row, :count], expected[row, :count], rtol=0, atol=1e-5)


ATTRIBUTES = {
    "": "ema_scheduler freeze_step teacher_exclude_layers num_codebooks",
    "codebooks.0": "codebook_decay codebook_size",
    "feature_extractor.conv_layers.0": "kernel_size stride init_weights",
    "student.layers.0.attention": "embed_dim num_heads dropout",
    "student.layers.0.feed_forward": "intermediate_dense intermediate_dropout output_dense",
    "student.pos_conv_embed": "convs depth embed_dim groups kernel_size layer_kernel_size layer_norm num_remove",
}


def test_published_attributes() -> None:
    model = tiny_model()
    for path, names in ATTRIBUTES.items():
        for name in names.split():
            assert hasattr(model.get_submodule(path), name), (path, name)
    assert model.teacher_exclude_layers == {
        f"pos_conv_embed.convs.{i}.{name}" for i in range(3) for name in ("weight", "bias")
    }


def test_published_attributes_take_effect() -> None:
    model = tiny_model().train()
    model.codebooks[0].codebook_decay = 1.0
    model.freeze_step, model.ema_scheduler = 3, lambda step: 0.5
    model.teacher_exclude_layers = {name for name, _ in model.teacher.named_parameters()}
    before = [codebook.codebook.clone() for codebook in model.codebooks]
    loss_of(model)
    moved = [not torch.equal(old, codebook.codebook) for old, codebook in zip(before, model.codebooks, strict=True)]
    assert moved == [False, True, True]
    assert model.update_ema(3) == 0.5
    assert not model.feature_extractor.conv_layers[0].conv.weight.requires_grad
    for teacher, student in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
        assert torch.equal(teacher, student)


def test_walking_the_tree_by_hand() -> None:
    model = tiny_model().eval()
    waveforms = torch.randn(2, 1500)
    x = model.feature_projection(model.feature_extractor(waveforms))
    x = model.student.layer_norm(x + model.student.pos_conv_embed(x))
    found = []
    for layer in model.student.layers:
        x, before_residual = layer(x)
        found.append(before_residual)
    torch.testing.assert_close(found, model.get_intermediate_outputs(waveforms))


def test_untouched() -> None:
    model = tiny_model()
    assert untouched(model.feature_extractor, model.student, *model.heads, *model.codebooks)
    touched: dict[str, Any] = {
        "hook": lambda m: m.register_forward_hook(lambda *_: None),
        "pre-hook": lambda m: m.register_forward_pre_hook(lambda *_: None),
        "backward hook": lambda m: m.register_full_backward_hook(lambda *_: None),
        "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
        "forward": lambda m: setattr(m, "forward", m.forward),
    }
    for name, touch in touched.items():
        linear = nn.Linear(2, 2)
        assert untouched(linear, None)
        touch(linear)
        assert not untouched(nn.ModuleList([linear])), name
    assert not untouched(nn.Identity())
    assert not untouched(nn.Sequential(nn.Linear(2, 2)))

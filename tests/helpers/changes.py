"""Changes that people make to a model from outside, and their effect on the published package.

``python tests/helpers/changes.py``, with ``spidr`` 0.1.2 installed, rewrites ``tests/golden/changes.json``.
"""

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

GOLDEN = Path(__file__).parents[1] / "golden"


def bent(y: Any) -> Any:
    """Distort a tensor in a way that a LayerNorm does not undo."""
    return y + torch.tanh(2 * y) if isinstance(y, Tensor) else (bent(y[0]), *y[1:])


class Bent(nn.Module):
    """Calls a module and bends its output, or the first of its outputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return bent(self.inner(*args, **kwargs))


class BentWeight(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return bent(weight)


class Adapter(nn.Module):
    """LoRA: a layer plus a product of two small matrices."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Parameter(torch.linspace(-1, 1, 2 * inner.in_features).view(2, -1))
        self.up = nn.Parameter(torch.linspace(-1, 1, 2 * inner.out_features).view(-1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.down.T @ self.up.T


def replace(model: nn.Module, path: str, make: Callable[[Any], nn.Module]) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, make(model.get_submodule(path)))


def replaced(model: nn.Module, path: str) -> None:
    replace(model, path, Bent)


def hooked(model: nn.Module, path: str) -> None:
    model.get_submodule(path).register_forward_hook(lambda module, inputs, output: bent(output))


def pre_hooked(model: nn.Module, path: str) -> None:
    model.get_submodule(path).register_forward_pre_hook(lambda module, inputs: (bent(inputs[0]), *inputs[1:]))


def monkeypatched(model: nn.Module, path: str) -> None:
    module: Any = model.get_submodule(path)
    original = module.forward
    module.forward = lambda *args, **kwargs: bent(original(*args, **kwargs))


def parametrized(model: nn.Module, path: str) -> None:
    parametrize.register_parametrization(model.get_submodule(path), "weight", BentWeight())


def pruned(model: nn.Module, path: str) -> None:
    prune.l1_unstructured(model.get_submodule(path), "weight", amount=0.5)


def pruned_for_good(model: nn.Module, path: str) -> None:
    pruned(model, path)
    prune.remove(model.get_submodule(path), "weight")


def adapted(model: nn.Module, path: str) -> None:
    replace(model, path, Adapter)


def in_a_sequence(model: nn.Module, path: str) -> None:
    replace(model, path, lambda inner: nn.Sequential(inner, nn.Tanh()))


def other_stride(model: nn.Module, path: str) -> None:
    model.get_submodule(path).stride = (1,)  # type: ignore[assignment]


def other_dilation(model: nn.Module, path: str) -> None:
    model.get_submodule(path).dilation = (2,)  # type: ignore[assignment]


def without(model: nn.Module, path: str) -> None:
    replace(model, path, lambda inner: nn.Identity())


def changes(model: nn.Module) -> Iterator[tuple[str, str, Callable[[nn.Module, str], None]]]:
    """(name of the change, path of the module, the change) for one module of each kind."""
    seen = set()
    for path, module in model.named_modules():
        kind = re.sub(r"\d+", "N", path)
        top = path.partition(".")[0]
        if not path or top in ("teacher", "statistics", "projection_dropout") or kind in seen:
            continue
        if isinstance(module, nn.ModuleList) or path == "student":
            continue
        seen.add(kind)
        for change in (replaced, hooked, pre_hooked, monkeypatched):
            yield change.__name__, path, change
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            for change in (parametrized, pruned, pruned_for_good):
                yield change.__name__, path, change
        if isinstance(module, nn.Linear):
            yield "adapted", path, adapted
        if kind in (
            "heads.N",
            "feature_projection",
            "feature_extractor.conv_layers.N",
            "student.layers.N.feed_forward",
        ):
            yield "in_a_sequence", path, in_a_sequence
        if kind == "feature_extractor.conv_layers.N.conv":
            yield "other_stride", path, other_stride
            yield "other_dilation", path, other_dilation
        if "layer_norm" in path or "dropout" in path:
            yield "without", path, without


def prepare(model: nn.Module) -> nn.Module:
    """Enlarge the weights, so that a change anywhere affects the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


def measure(model: nn.Module, waveforms: Tensor) -> list[float]:
    """Features, unit probabilities, loss and gradient, each as one number."""
    with torch.no_grad():
        features = model.get_intermediate_outputs(waveforms)  # type: ignore[operator]
        probabilities = model.get_codebooks(waveforms)  # type: ignore[operator]
    frames = features[0].shape[1]
    mask = torch.arange(frames) % 3 == 0
    loss, _ = model(waveforms, mask=mask.expand(len(waveforms), frames))
    loss.mean().backward()
    gradient = model.mask_embedding.grad  # type: ignore[union-attr]
    values = features[-1].abs().mean(), probabilities[-1].square().mean(), loss.mean(), gradient.norm()  # type: ignore[union-attr,operator]
    return [*(value.item() for value in values), float(frames)]


def outcomes(model: nn.Module, waveforms: Tensor) -> dict[str, list[float]]:
    """Measurements after each change, by name."""
    found = {"unchanged": measure(copy.deepcopy(model), waveforms)}
    for name, path, change in changes(model):
        changed = copy.deepcopy(model)
        change(changed, path)
        found[f"{name} {path}"] = measure(changed, waveforms)
    return found


def calls(model: nn.Module, waveforms: Tensor) -> dict[str, list[Any]]:
    """Number of calls of each module in a training forward, and the shapes of its input and output."""
    found: dict[str, list[Any]] = {}

    def shape(value: Any) -> Any:
        return list(value.shape) if isinstance(value, Tensor) else [shape(item) for item in value]

    for path, module in model.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, path=path: found.setdefault(path, []).append(
                [shape(inputs[:1]), shape(output) if path else None]
            )
        )
    frames = model.get_intermediate_outputs(waveforms)[0].shape[1]  # type: ignore[operator]
    found.clear()
    model(waveforms, mask=(torch.arange(frames) % 3 == 0).expand(len(waveforms), frames))
    return {path: [len(shapes), *shapes[0]] for path, shapes in found.items()}


def main() -> None:
    from spidr.config import DinoSRConfig, SpidRConfig
    from spidr.models import DinoSR, SpidR

    document = {}
    for name, model_class, config_class in (("spidr-tiny", SpidR, SpidRConfig), ("dinosr-tiny", DinoSR, DinoSRConfig)):
        folder = GOLDEN / name
        cfg = config_class(**json.loads((folder / "config.json").read_text())["model"])
        model = model_class(cfg)
        model.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["model"])
        waveforms = torch.load(folder / "tensors.pt", weights_only=True)["waveforms"]
        values = {key: [float(f"{x:.6g}") for x in row] for key, row in outcomes(prepare(model), waveforms).items()}
        document[name] = {"outcomes": values, "calls": calls(copy.deepcopy(model).train(), waveforms)}
    lines = json.dumps(document, separators=(",", ":")).replace('],"', '],\n"')
    (GOLDEN / "changes.json").write_text(lines + "\n")


if __name__ == "__main__":
    sys.exit(main())

"""The formula against PyTorch's operation counter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from helpers.small_models import tiny_config, tiny_model
from spidr.config import DinoSRConfig, SpidRConfig
from spidr.models.flops import extractor_flops, peak_tflops, step_flops, transformer_flops
from spidr.models.transformer import Transformer

SAMPLES = 12_005


ATEN = torch.ops.aten
CUSTOM: dict[Any, Callable[..., int]] = {
    ATEN.addmm_: lambda _, a, b: 2 * a.shape[0] * b.numel(),
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, *_: 4 * q.numel() * q.shape[2],
    # Without recomputation in the kernel.
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, *__: 8 * q.numel() * q.shape[2],
    # PyTorch's formula counts each group's gradient as if there were only one group.
    ATEN.convolution_backward: lambda grad, _, weight, *__: 4 * grad.numel() * weight[0].numel(),
}


class Counter(TorchDispatchMode):
    """Count operations by PyTorch's registry and the formulas above."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, operator = func(*args, **(kwargs or {})), func.overloadpacket
        if operator in CUSTOM:
            self.total += CUSTOM[operator](*args)
        elif operator in flop_registry:
            self.total += flop_registry[operator](*args, **(kwargs or {}), out_val=out)
        return out


def test_extractor() -> None:
    cfg = tiny_config()
    x = torch.empty(1, 1, SAMPLES, device="meta")
    for (width, kernel, stride), expected in zip(
        cfg.extractor_conv_layer_config, extractor_flops(cfg, SAMPLES), strict=True
    ):
        with Counter() as counter:
            x = functional.conv1d(x, torch.empty(width, x.shape[1], kernel, device="meta"), stride=stride)
        assert counter.total == expected


@torch.no_grad()
def test_transformer() -> None:
    for layers in (3, 4):
        cfg = tiny_config(encoder_num_layers=layers)
        with Counter() as counter:
            Transformer.build(cfg).eval()(torch.randn(1, 70, 32))
        assert counter.total == transformer_flops(cfg, 70)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("model_type", ["spidr", "dinosr"])
def test_training_step(model_type: str, frozen: bool) -> None:
    """Up to the outputs between utterances, which are computed and dropped."""
    no_dropout = {"encoder_dropout": 0.0, "encoder_attention_dropout": 0.0, "encoder_layer_drop": 0.0}
    model = tiny_model(model_type, **no_dropout).train()
    if frozen:
        model.freeze_extractor()
    mask = torch.arange(100).repeat(2, 1)
    with Counter() as counter:
        loss, _ = model(torch.randn(2, SAMPLES), mask=mask)
        loss.sum().backward()
    assert counter.total == pytest.approx(2 * step_flops(model.cfg, SAMPLES, 100, frozen=frozen), rel=0.02)


def test_base_model() -> None:
    features = sum(extractor_flops(SpidRConfig(), 8 * 16_000)) + transformer_flops(SpidRConfig(), 400)
    assert features / 8 == pytest.approx(14e9, rel=0.1)
    assert step_flops(DinoSRConfig(), 8 * 16_000, 200) / 8 == pytest.approx(56e9, rel=0.1)


def test_peaks() -> None:
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312
    assert peak_tflops("NVIDIA H100 PCIe", "bfloat16") == 756
    assert peak_tflops("NVIDIA H100 80GB HBM3", "float32") == 66.9
    assert peak_tflops("Tesla V100-SXM2-32GB", "bfloat16") is None
    assert peak_tflops("NVIDIA GeForce RTX 4090", "bfloat16") == 165.2
    assert peak_tflops("NVIDIA B200", "bfloat16") == 2250
    assert peak_tflops("NVIDIA H200 NVL", "bfloat16") == 835.5
    assert peak_tflops("NVIDIA GH200 480GB", "bfloat16") == 989.4
    assert peak_tflops("AMD Instinct MI300X", "float16") == 1307.4
    for unknown in ("NVIDIA T4", "NVIDIA RTX A1000", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        assert peak_tflops(unknown, "bfloat16") is None

"""oneDNN's products against PyTorch's own."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.operators import Operators
from spidr.models import kernels
from spidr.models.kernels import exact_products, fast_products, linear, through, through_gelu
from spidr.tools.errors import InputError

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no such operation of oneDNN"
)


@pytest.fixture(autouse=True)
def _onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "prefers_onednn", lambda: True)
    monkeypatch.setattr(kernels, "SMALLEST", 1)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


LEFT = {
    "rows": random(30, 12),
    "batch": random(2, 15, 12),
    "transposed": random(12, 30).T,
    "part of rows": random(30, 24)[:, 6:18],
    "transposed part": random(20, 30)[4:16].T,
    "repeated rows": random(12).expand(30, 12),
    "repeated columns": random(30, 1).expand(30, 12),
    "every other column": random(30, 24)[:, ::2],
    "one row": random(1, 12),
}
RIGHT = {
    "rows": random(8, 12),
    "transposed": random(12, 8).T,
    "part of rows": random(8, 24)[:, 6:18],
    "transposed part": random(20, 8)[4:16].T,
    "one row": random(1, 12),
}


@pytest.mark.parametrize("x", LEFT.values(), ids=LEFT.keys())
@pytest.mark.parametrize("weight", RIGHT.values(), ids=RIGHT.keys())
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear(x: Tensor, weight: Tensor, with_bias: bool) -> None:
    inputs = [x.detach(), weight.detach(), *([random(len(weight))] if with_bias else [])]
    found = [t.requires_grad_() for t in inputs]
    expected = [t.detach().double().requires_grad_() for t in inputs]
    out, reference = linear(*found), F.linear(*expected)
    torch.testing.assert_close(out, reference.float(), rtol=1e-5, atol=1e-5)
    for seed in (random(*out.shape), random(1).expand(out.shape)):
        grads = torch.autograd.grad(out, found, seed, retain_graph=True)
        references = torch.autograd.grad(reference, expected, seed.double(), retain_graph=True)
        for a, b in zip(grads, references, strict=True):
            torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)


def test_gradients_of_gradients() -> None:
    def penalty(function: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        grads = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g.square().sum() for g in grads), torch.zeros(())), leaves)

    inputs = random(5, 4), random(3, 4), random(3)
    for a, b in zip(penalty(linear, *inputs), penalty(F.linear, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_only_tensors_that_need_a_gradient_get_one() -> None:
    x, module = random(6, 4), nn.Linear(4, 3)
    module.bias.requires_grad_(False)
    through(module, x).sum().backward()
    assert x.grad is module.bias.grad is None
    assert module.weight.grad is not None
    with torch.no_grad():
        assert not through(module, x).requires_grad


def test_gelu_in_one_operation() -> None:
    module, x = nn.Linear(48, 64), random(2, 20, 48)
    expected = F.gelu(F.linear(x, module.weight, module.bias))
    torch.testing.assert_close(through_gelu(module, x), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(through_gelu(module, x), expected, rtol=1e-5, atol=1e-5)
        module.register_forward_hook(lambda *_: torch.zeros(2, 20, 64))
        assert not through_gelu(module, x).any()


def test_threads_agree() -> None:
    module, inputs = nn.Linear(64, 48).requires_grad_(False), [random(200 + i, 64) for i in range(16)]
    expected = [through(module, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for a, b in zip(pool.map(partial(through, module), inputs), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_use_pytorch(dtype: torch.dtype) -> None:
    module, x = nn.Linear(12, 8).to(dtype), random(9, 12).to(dtype)
    assert torch.equal(through(module, x), F.linear(x, module.weight, module.bias))
    if dtype == torch.bfloat16:
        module.float()
        with torch.autocast("cpu", dtype):
            assert torch.equal(through(module, x.float()), F.linear(x.float(), module.weight, module.bias))


class Through(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return through(self.module, x)


def calls_onednn(function: Any) -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return any(event.key == "mkldnn::_linear_pointwise" for event in profile.key_averages())


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")
def test_where_pytorchs_own_product_is_used() -> None:
    module, x = Through(nn.Linear(12, 8)), random(9, 12)
    assert calls_onednn(partial(module, x))
    with Operators() as operators:  # FLOP counters see the usual operations
        module(x)
    assert "addmm" in {name for name, _ in operators.log}
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert not calls_onednn(partial(compiled, x))
    exported = torch.export.export(module, (x,))
    assert "linear" in str(exported.graph)
    assert "mkldnn" not in str(exported.graph)
    assert "linear" in str(torch.jit.trace(module, x).graph)
    jacobian = torch.func.jacrev(lambda x: module(x))(x)
    assert jacobian.shape == (9, 8, 9, 12)
    assert module.to("meta")(x.to("meta")).device.type == "meta"


@pytest.mark.parametrize(
    ("processor", "capability", "chosen", "expected"),
    [
        ("vendor_id : AuthenticAMD", "AVX512", None, True),
        ("vendor_id : AuthenticAMD", "AVX2", None, False),
        ("vendor_id : GenuineIntel", "AVX512", None, False),
        ("arm", "DEFAULT", None, False),
        ("vendor_id : AuthenticAMD", "AVX512", "0", False),
        ("vendor_id : GenuineIntel", "AVX2", "1", True),
    ],
)
def test_rule(
    processor: str, capability: str, chosen: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "processor", lambda: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    if chosen is None:
        monkeypatch.delenv(kernels.ONEDNN_SETTING, raising=False)
    else:
        monkeypatch.setenv(kernels.ONEDNN_SETTING, chosen)
    assert kernels.prefers_onednn.__wrapped__() == expected


def test_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv(kernels.ONEDNN_SETTING, "yes")
    with pytest.raises(InputError, match="SPIDR_ONEDNN: found 'yes', expected 0 or 1"):
        kernels.prefers_onednn.__wrapped__()


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """PyTorch's switch as a user left it, on a processor where it may be used."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("no such switch before torch 2.9")
    monkeypatch.setattr(kernels, "prefers_onednn_for_all", lambda: True)
    switch: Any = torch.backends.mkldnn.matmul
    before, switch.fp32_precision = switch.fp32_precision, "ieee"
    yield switch
    switch.fp32_precision = before


def test_the_switch_is_put_back(switch: Any) -> None:
    x = random(3, 64, 48)
    with fast_products(x):
        with exact_products(x.device, 768):
            assert switch.fp32_precision == "bf16"
        assert switch.fp32_precision == "bf16"
    assert switch.fp32_precision == "ieee"
    with fast_products(x.to("meta")), exact_products(torch.device("meta"), 768), exact_products(x.device):
        assert switch.fp32_precision == "ieee"
    with exact_products(x.device, 48), fast_products(x):  # a narrow model does without, at any size of product
        assert switch.fp32_precision == "ieee"
    with pytest.raises(KeyboardInterrupt), fast_products(x):
        raise KeyboardInterrupt
    assert switch.fp32_precision == "ieee"


@pytest.mark.parametrize("has_amx", [False, True])
def test_products_are_exact(has_amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that would round to bfloat16 keeps PyTorch's own."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    chosen = kernels.prefers_onednn_for_all.__wrapped__()
    assert not (chosen and has_amx)
    with torch.autocast("cpu", torch.bfloat16):  # as when a bfloat16 model comes first
        assert kernels.prefers_onednn_for_all.__wrapped__() == chosen
    monkeypatch.setattr(kernels, "prefers_onednn_for_all", lambda: chosen)
    x, weight = random(3, 64, 48), random(3, 48, 32)
    with fast_products(x):
        found = x @ weight
    torch.testing.assert_close(found, (x.double() @ weight.double()).float(), rtol=0, atol=1e-5)


def test_several_threads_share_the_switch(switch: Any) -> None:
    x = random(3, 64, 48)

    def multiply(_: int) -> Tensor:
        with fast_products(x):
            return x @ x.mT

    with ThreadPoolExecutor(4) as pool:
        products = list(pool.map(multiply, range(200)))
    assert all(torch.equal(product, products[0]) for product in products)
    assert switch.fp32_precision == "ieee"

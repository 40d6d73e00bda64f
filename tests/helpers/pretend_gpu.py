"""A GPU for machines without one: tensors that claim to be on ``cuda:0``, with their values on the CPU.

An operator that gets tensors of both devices raises, as on a GPU, and what waits for the device is recorded. There is
no backward pass, since PyTorch's engine asks the driver for the device; gradients are made up from the weights.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")


class FakeTensor(Tensor):
    """A tensor on the pretended GPU. (PyTorch's own are called so too; the package takes either for a plain weight.)"""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> FakeTensor:
        shape, strides, offset = held.shape, held.stride(), held.storage_offset()
        made = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, storage_offset=offset, dtype=held.dtype, device=CUDA
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _current().run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def record_stream(self, stream: Any) -> None:
        _current().log.append(f"record {stream.name}")


class Stream:
    """Has a name; records what waits for what."""

    def __init__(self, device: Any = None, *, name: str = "side") -> None:
        self.device, self.name = device, name

    def wait_stream(self, other: Stream) -> None:
        _current().log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        _current().log.append(f"the host waits for {self.name}")


class Event:
    def __init__(self, **_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...


class PretendedGpu(TorchDispatchMode):
    """Attributes: ``log``, what streams and copies did in their order, and ``waits``, what made the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.waits: list[str] = []
        self.streams = [Stream(name="main")]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = {id(x.held): x for x in tensors if isinstance(x, FakeTensor)}
        others = [x for x in tensors if not isinstance(x, FakeTensor) and x.ndim > 0]
        if ours and others and name not in ("_to_copy", "copy_", "set_", "set_data"):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, cuda:0 and cpu")
        given = kwargs.get("device")
        on_gpu = bool(ours) if given is None else torch.device(given).type == "cuda"
        if name == "copy_":
            on_gpu = isinstance(args[0], FakeTensor)
        elif name == "_to_copy" and on_gpu and not ours:
            self.log.append(f"copy on {self.streams[-1].name}")
        pinned = bool(kwargs.pop("pin_memory", False)) or (name == "copy_" and kwargs.get("non_blocking"))
        if ours and (name in WAITING or (name in ("_to_copy", "copy_") and not on_gpu and not pinned)):
            self.waits.append(name)
        if given is not None:
            kwargs["device"] = torch.device("cpu")
        unwrapped = tree_map(lambda x: x.held if isinstance(x, FakeTensor) else x, (args, kwargs))
        out = func(*unwrapped[0], **unwrapped[1])
        if not on_gpu:
            return out

        def wrap(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return ours[id(x)] if id(x) in ours else FakeTensor(x)

        return tree_map(wrap, out)


_active: list[PretendedGpu] = []


def _current() -> PretendedGpu:
    return _active[-1]


def _backward(loss: Tensor, *_: Any, **__: Any) -> None:
    """Give every parameter that the loss depends on the same made-up gradient on every device."""
    seen, following = set(), [loss.grad_fn]
    while following:
        node = following.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        following += [function for function, _ in node.next_functions]
        if (parameter := getattr(node, "variable", None)) is not None:
            made = 0.1 * parameter.detach() + 0.01
            parameter.grad = made if parameter.grad is None else parameter.grad + made


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    """A machine with one GPU, in all threads."""
    gpu = PretendedGpu()
    run_thread = threading.Thread.run

    def run(self: threading.Thread) -> None:
        torch._C._set_only_lift_cpu_tensors(True)
        with gpu:
            run_thread(self)

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        gpu.streams.append(chosen)
        yield
        gpu.streams.pop()

    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        pytest.skip("this torch is too old for a pretended GPU")
    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_name": lambda _=None: "NVIDIA H200",
        "get_device_capability": lambda _=None: (9, 0),
        "max_memory_allocated": lambda _=None: 2**30,
        "get_rng_state": lambda _=None: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "manual_seed_all": lambda _: None,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda _=None: gpu.streams[-1],
        "stream": stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(threading.Thread, "run", run)
    monkeypatch.setattr(Tensor, "backward", _backward)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self, *_: self)
    torch._C._ensureCUDADeviceGuardSet()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # for this thread: makes `torch.tensor(…, device="cuda")` an operator
    _active.append(gpu)
    try:
        with gpu:
            yield gpu
    finally:
        _active.pop()
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(swaps)

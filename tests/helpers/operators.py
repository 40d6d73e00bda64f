"""Record the operators that a piece of code calls."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Records name and output of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.log.append((func.overloadpacket.__name__, out))
        return out

    def names(self) -> set[str]:
        return {name for name, _ in self.log}

    def outputs(self, *names: str) -> list[Tensor]:
        return [out for name, out in self.log if name in names and isinstance(out, Tensor)]

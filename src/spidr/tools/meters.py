"""From measurements of steps to lines of metrics: a dataclass says how each of its fields is combined.

``loss: Mean`` is all it takes: each step's value is copied to the host without waiting for the device, and an
interval's line shows the mean over its steps.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import torch
from torch import Tensor

Value = Tensor | float
Mean = Annotated[Value, "mean"]
"""A number; the mean over the steps."""
Last = Annotated[Value, "last"]
"""A number; the last step's."""
PerCodebook = Annotated[Value, "per codebook"]
"""A number per codebook, (K,); ``NAME_l7`` is the mean over the steps for layer 7's codebook."""
PerCodebookAndMean = Annotated[Value, "per codebook and mean"]
"""As :data:`PerCodebook`; also, ``NAME`` is the mean over the codebooks."""
Transport = Annotated[Value, "transport"]
"""A number for the loop itself."""

Values = dict[str, list[float]]


class Interval:
    """The steps since the last line of metrics, as sums for the checkpoint: name → (sum, number of steps).

    The dataclass ``cls`` says how fields are combined; ``layers`` are those of the codebooks.
    """

    def __init__(self, cls: type, layers: Sequence[str], sums: dict[str, list[float]] | None = None) -> None:
        self.sums = {} if sums is None else {name: [float(total), int(n)] for name, (total, n) in sums.items()}
        self._kinds, self._layers = get_type_hints(cls, include_extras=True), layers
        self._last: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self._last)

    def add(self, values: Values) -> None:
        """Count a step."""
        for name, kind in self._kinds.items():
            numbers = values[name]
            if kind == Last:
                self._last[name] = numbers[0]
            if kind == Mean:
                self._count(name, numbers[0])
            if kind == PerCodebookAndMean:
                self._count(name, sum(numbers) / len(numbers))
            if kind in (PerCodebook, PerCodebookAndMean):
                for layer, number in zip(self._layers, numbers, strict=True):
                    self._count(f"{name}_{layer}", number)

    def _count(self, name: str, number: float) -> None:
        entry = self.sums.setdefault(name, [0.0, 0])
        entry[0] += number
        entry[1] += 1

    def pop(self) -> dict[str, float]:
        """The values of a line; starts again."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        last, self.sums, self._last = self._last, {}, {}
        return means | last


class Readback:
    """Copies a step's measurements to the host while the device works on the next step.

    On a GPU a step's values are taken one step later, so the host never waits for the step it has just issued, and is
    never more than one step ahead. Elsewhere they are available at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.asynchronous = device.type == "cuda"
        self._pending: deque[tuple[int, Values, dict[str, int], Tensor, torch.cuda.Event | None]] = deque()

    def put(self, step: int, measured: Any) -> None:
        """Start copying the fields of a dataclass: scalars and vectors on the device, or numbers on the host."""
        values = {field.name: getattr(measured, field.name) for field in fields(measured)}
        known = {name: [value] for name, value in values.items() if not isinstance(value, Tensor)}
        tensors = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
        flat = torch.cat([value.reshape(-1).float() for value in tensors.values()])
        sizes = {name: value.numel() for name, value in tensors.items()}
        event = None
        if self.asynchronous:
            flat = torch.empty(flat.shape, pin_memory=True).copy_(flat, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, known, sizes, flat, event))

    def take(self, *, wait: bool = False) -> list[tuple[int, Values]]:
        """Values not yet taken, by step; on a GPU without the last step's, unless ``wait``."""
        keep = 1 if self.asynchronous and not wait else 0
        taken = []
        while len(self._pending) > keep:
            step, known, sizes, flat, event = self._pending.popleft()
            if event is not None:
                event.synchronize()  # of an earlier step, or requested
            parts = flat.cpu().split(list(sizes.values()))
            taken.append((step, known | {name: part.tolist() for name, part in zip(sizes, parts, strict=True)}))
        return taken

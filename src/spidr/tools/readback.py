"""Bringing a step's measurements to the host without waiting for it. Imports nothing else of the package."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

Values = dict[str, list[float]]


class Readback:
    """Copies named tensors of each step to the host while the device works on the next step.

    On a GPU a step's values are taken one step later, so the host never waits for the step it has just issued, and is
    never more than one step ahead. Elsewhere they are there at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.asynchronous = device.type == "cuda"
        self._pending: deque[tuple[int, Values, dict[str, int], Tensor, torch.cuda.Event | None]] = deque()

    def put(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Start copying the values of ``step``: scalars and vectors on the device, or numbers that are here already."""
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
        """Values that have not been taken, by step; on a GPU all but the last step's unless ``wait``."""
        keep = 1 if self.asynchronous and not wait else 0
        taken = []
        while len(self._pending) > keep:
            step, known, sizes, flat, event = self._pending.popleft()
            if event is not None:
                event.synchronize()  # of an earlier step, or asked for
            parts = flat.cpu().split(list(sizes.values()))
            taken.append((step, known | {name: part.tolist() for name, part in zip(sizes, parts, strict=True)}))
        return taken

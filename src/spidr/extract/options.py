"""How recordings are encoded."""

from dataclasses import dataclass
from typing import Literal, get_args

from spidr.config import ModelType
from spidr.tools.errors import InputError

Device = Literal["auto", "cuda", "mps", "cpu"]
Dtype = Literal["float32", "bfloat16", "auto"]
OnError = Literal["raise", "skip"]

MAX_SECONDS = 1_000_000
MAX_THREADS = 1000


def check_choice(name: str, value: object, choices: object) -> None:
    """Check that an argument is one of those that a ``Literal`` lists. Raises InputError if not."""
    accepted = get_args(choices)
    if value not in accepted:
        raise InputError(f"{name}: found {value!r}, expected {', '.join(accepted[:-1])} or {accepted[-1]}")


@dataclass(frozen=True)
class Options:
    """How recordings are encoded.

    Attributes:
        device: "auto" (CUDA, else MPS, else the CPU), "cuda", "mps" or "cpu".
        dtype: "float32"; "bfloat16" (autocast), whose units depend on the batches; or "auto", bfloat16 where the
            hardware computes in it, otherwise float32. About 99 of 100 units are equal.
        batch_seconds: Seconds of audio in a batch, padding included; 0: one recording at a time. None: 0 on the CPU,
            else 240.
        threads: Recordings encoded at once on the CPU; None: as many as PyTorch has threads. At most 1,000.
        window: Encode long recordings in pieces of this many seconds, which are read one at a time (see
            :meth:`spidr.models.DinoSR.encode`). None: exact, in time that grows with the square of the length.
        context: Seconds of context on each side of a window; None: a quarter of it.
        resample: Convert recordings that are not 16 kHz mono.
        on_error: "raise", or "skip" recordings that cannot be encoded.
        model_type: "spidr" or "dinosr", for a checkpoint that does not say.
        progress: Show progress on standard error.
    """

    device: Device = "auto"
    dtype: Dtype = "float32"
    batch_seconds: float | None = None
    threads: int | None = None
    window: float | None = None
    context: float | None = None
    resample: bool = False
    on_error: OnError = "raise"
    model_type: ModelType | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name, choices in (("device", Device), ("dtype", Dtype), ("on_error", OnError)):
            check_choice(name, getattr(self, name), choices)
        for name in ("batch_seconds", "window", "context"):
            value = getattr(self, name)
            if value is not None and not (0 <= value <= MAX_SECONDS and (value > 0 or name != "window")):
                accepted = "more than 0" if name == "window" else "0 or more"
                raise InputError(f"{name}: found {value}, expected seconds, {accepted}, at most {MAX_SECONDS:,}")
        if self.context is not None and self.window is None:
            raise InputError(f"context: found {self.context}, but there is no window")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise InputError(f"threads: found {self.threads}, expected 1 to {MAX_THREADS:,}")

"""Recordings through a model, as fast as the machine allows and as if each had been alone.

What a recording gives must not depend on the others, on the number of processes or on who computes it, but rounding
does: a matrix product may add in another order when it has more rows. So

- on CPUs every recording goes through the model alone, on one thread, and as many at once as there are threads. Larger
  batches would not be faster;
- on GPUs recordings of like length form a padded batch. Features then differ by rounding. A unit could differ where two
  codewords are nearly equal, so a recording that has such a frame goes through the model once more, alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from spidr.config import SAMPLE_RATE, RunConfig
from spidr.environment import Environment
from spidr.extract.sources import Item, read_item
from spidr.models import DinoSR
from spidr.models.hub import load_encoder
from spidr.tools.errors import InputError
from spidr.tools.frames import conv_length

logger = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")

BATCH_SECONDS = 240.0
"""Seconds of audio in a batch on a GPU, padding included."""

SHAPING = (
    "extractor_mode",
    "extractor_conv_bias",
    "extractor_conv_layer_config",
    "encoder_embed_dim",
    "encoder_pos_conv_kernel",
    "encoder_pos_conv_groups",
    "encoder_pos_conv_depth",
    "encoder_num_layers",
    "encoder_num_heads",
    "encoder_ff_interm_features",
    "encoder_layer_norm_first",
    "encoder_qkv_bias",
    "codebook_size",
    "num_codebooks",
)
"""Settings of a model that change its features or units, beside its weights. All others are of training only."""

LONG = 120 * SAMPLE_RATE
"""Longer recordings (in samples) get all threads of a CPU, one after the other, so that none is the last one alone."""

Device = Literal["auto", "cuda", "mps", "cpu"]
Dtype = Literal["float32", "bfloat16", "auto"]
OnError = Literal["raise", "skip"]

MAX_SECONDS = 1_000_000
MAX_THREADS = 1000

NEAR = 3e-5
"""Two scores are near each other if they differ by less than this share of (1 + the range of the frame's scores). More
than ten times the largest change of a score by batching that was seen in float32."""


def check_choice(name: str, value: object, choices: object) -> None:
    """Check that an argument is one of those that a ``Literal`` lists.

    Raises:
        InputError: It is not.
    """
    accepted = get_args(choices)
    if value not in accepted:
        raise InputError(f"{name}: found {value!r}, expected {', '.join(accepted[:-1])} or {accepted[-1]}")


@dataclass(frozen=True)
class Options:
    """How recordings are encoded.

    Attributes:
        device: "auto" (CUDA, else MPS, else the CPU), "cuda", "mps" or "cpu".
        dtype: "float32"; "bfloat16" (autocast), of which the units of batches are only as stable as the batches; or
            "auto": bfloat16 where the hardware computes in it, else float32.
        batch_seconds: Seconds of audio in a batch, padding included; 0: one recording at a time. None: 0 on the CPU,
            else 240.
        threads: Recordings encoded at once on the CPU; None: as many as PyTorch has threads. At most 1,000.
        window: Encode long recordings in pieces of that many seconds (see :meth:`spidr.models.DinoSR.encode`). None:
            exact, in time that grows with the square of the length.
        context: Seconds seen on each side of a window; None: a quarter of it.
        resample: Convert recordings that are not 16 kHz mono (needs FFmpeg).
        on_error: "raise", or "skip" recordings that cannot be encoded.
        progress: Show a progress bar on standard error.
    """

    device: Device = "auto"
    dtype: Dtype = "float32"
    batch_seconds: float | None = None
    threads: int | None = None
    window: float | None = None
    context: float | None = None
    resample: bool = False
    on_error: OnError = "raise"
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
            raise InputError(f"context: found {self.context}, but there is no window that it could be the context of")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise InputError(f"threads: found {self.threads}, expected 1 to {MAX_THREADS:,}")

    def run_config(self) -> RunConfig:
        """What :func:`spidr.environment.environment` wants to know; only the device counts."""
        return RunConfig(workdir=".", wandb_project="spidr", wandb_name="extract", device=self.device)


class Encoded(NamedTuple):
    """What a recording gave, or why it gave nothing."""

    item: Item
    values: NDArray[Any] | None
    error: str | None = None


class Skipped(dict[str, str]):
    """Recordings that could not be encoded, by name, and why."""

    def note(self, batch: list[Encoded]) -> None:
        """Add those of a batch."""
        for item, _, error in batch:
            if error is not None:
                logger.warning("Skipped: %s", error)
                self[item.name] = error


class _Loaded(NamedTuple):
    item: Item
    waveform: Tensor | None
    error: str | None = None


Scores = Callable[[Tensor, Tensor], Tensor]
"""Padded standardised waveforms and their lengths to scores of each unit, (B, T, V)."""


class Encoder:
    """A model on its device, and what it gives of recordings.

    Args:
        model: A published model's name, a checkpoint, or a model.
        layer: Counted from 1; None: the model's best.
        options: How.
        env: This process among all.

    Raises:
        InputError: There is no such model or layer.
    """

    def __init__(
        self, model: str | Path | DinoSR, layer: int | None, options: Options, env: Environment, *, codebook: bool
    ) -> None:
        self.name = type(model).__name__ if isinstance(model, DinoSR) else str(model)
        self.model = (model.eval() if isinstance(model, DinoSR) else load_encoder(model)).to(env.device)
        self.layer = self.model.best_layer if layer is None else layer
        self.options, self.env = options, env
        total = len(self.model.student.layers)
        first = self.model.codebook_layers.start if codebook else 1
        if not first <= self.layer <= total:
            lacks = "has no codebook" if 1 <= self.layer <= total else "does not exist"
            having = "have a codebook" if codebook else "exist"
            given = f"layer {self.layer}, the default," if layer is None else f"layer {self.layer}"
            raise InputError(f"{given} {lacks}; layers {first} to {total} {having}")
        self.bfloat16 = options.dtype == "bfloat16" or (options.dtype == "auto" and _has_bfloat16(env.device))

    def settings(self) -> dict[str, Any]:
        """What the values depend on."""
        shapes = self.model.feature_extractor.shapes
        return {
            "model": self.name,
            "weights": _fingerprint(self.model),
            "layer": self.layer,
            "dtype": "bfloat16" if self.bfloat16 else "float32",
            "window": self.options.window,
            "context": self.options.context,
            "resample": self.options.resample,
            "frame_seconds": float(np.prod([stride for _, _, stride in shapes])) / SAMPLE_RATE,
        }

    # ------------------------------------------------------------------------------------------------- one batch

    def features(self, waveforms: list[Tensor]) -> list[Tensor]:
        """Features of some recordings, float32 (T, D) each."""
        if len(waveforms) == 1:
            return [self.features_alone(waveforms[0])]
        padded, lengths = self._pad(waveforms)
        features, frames = self.model.encode(padded, lengths, layer=self.layer)
        return [row[:count].float() for row, count in zip(features, frames.tolist(), strict=True)]

    def features_alone(self, waveform: Tensor) -> Tensor:
        """Features of a recording, float32 (T, D): what all others must equal."""
        options, given = self.options, waveform.to(self.env.device).unsqueeze(0)
        features, _ = self.model.encode(given, layer=self.layer, window=options.window, context=options.context)
        return features[0].float()

    def units(self, waveforms: list[Tensor]) -> list[Tensor]:
        """Units of some recordings, int64 (T,) each: the most likely codewords of the layer."""
        return self.discretise(waveforms, self._log_probabilities, self.units_alone)

    def units_alone(self, waveform: Tensor) -> Tensor:
        """Units of a recording, int64 (T,): what all others must equal."""
        options, given = self.options, waveform.to(self.env.device).unsqueeze(0)
        units, _ = self.model.units(given, layer=self.layer, window=options.window, context=options.context)
        return units[0]

    def _log_probabilities(self, padded: Tensor, lengths: Tensor) -> Tensor:
        probabilities = self.model.get_codebooks(padded, lengths=lengths, num_layers=self.layer)[-1]
        assert probabilities is not None
        return probabilities.float().clamp(min=1e-30).log()

    def discretise(self, waveforms: list[Tensor], scores: Scores, alone: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Units of some recordings by the highest score, the same as ``alone`` gives of each."""
        if len(waveforms) == 1:
            return [alone(waveforms[0])]
        padded, lengths = self._pad([F.layer_norm(waveform, waveform.shape) for waveform in waveforms])
        of_batch = scores(padded, lengths)
        frames = conv_length(self.model.feature_extractor.shapes, lengths).tolist()
        found = []
        for waveform, values, count in zip(waveforms, of_batch, frames, strict=True):
            values = values[:count]
            (first, second), units = values.topk(2).values.unbind(-1), values.argmax(-1)
            near = first - second < NEAR * (1 + first - values.amin(-1))
            redo = not self.bfloat16 and bool(near.any())
            found.append(alone(waveform) if redo else units)
        return found

    def _pad(self, waveforms: list[Tensor]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(waveform) for waveform in waveforms], device=self.env.device)
        return pad_sequence(waveforms, batch_first=True).to(self.env.device), lengths

    # ------------------------------------------------------------------------------------------------- all of them

    def plan(self, items: Sequence[Item]) -> list[list[Item]]:
        """Batches, long recordings first: the same list for any number of processes.

        One of unknown length goes alone: it may be longer than a batch, or than a window, which batches do not have.
        """
        seconds = self.options.batch_seconds
        if seconds is None:
            seconds = 0.0 if self.env.device.type == "cpu" else BATCH_SECONDS
        batches: list[list[Item]] = []
        for item in sorted(items, key=lambda item: (-item.num_samples, item.name)):
            longest = batches[-1][0].num_samples if batches else 0
            fits = item.num_samples > 0 and bool(batches) and (len(batches[-1]) + 1) * longest <= seconds * SAMPLE_RATE
            if fits and not (self.options.window and longest > self.options.window * SAMPLE_RATE):
                batches[-1].append(item)
            else:
                batches.append([item])
        return batches

    def run(
        self, batches: Sequence[list[Item]], encode: Callable[[list[Tensor]], list[Tensor]], description: str
    ) -> Generator[list[Encoded]]:
        """Encode this process's share of some batches, in their order.

        Args:
            batches: The batches of all processes.
            encode: Waveforms to values, one tensor for each.
            description: What the progress bar says.

        Raises:
            InputError: A recording cannot be encoded, unless they are to be skipped.
        """
        batches = batches[self.env.rank :: self.env.world_size]
        threads, on_cpu = torch.get_num_threads(), self.env.device.type == "cpu"
        at_once = (self.options.threads or threads) if on_cpu else 1
        groups = [batches]
        if at_once > 1:
            long = [batch for batch in batches if batch[0].num_samples > LONG]
            groups = [long, batches[len(long) :]]
        # Rank 0 shows its own share: that of the others takes about as long.
        shown = self.options.progress and self.env.rank == 0
        total = sum(item.num_samples for batch in batches for item in batch)
        unit, seconds = ("h", 3600) if total >= 3600 * SAMPLE_RATE else ("min", 60)
        scale = {"unit": unit, "unit_scale": 1 / seconds / SAMPLE_RATE}
        try:
            # Of no audio, a bar would stay at 0 %.
            with tqdm(total=total, desc=description, disable=not (shown and total), bar_format=_BAR, **scale) as bar:
                for group in groups:
                    workers = 1 if group is not groups[-1] else min(at_once, len(group))
                    with closing(self._encode(group, encode, workers, at_once // max(1, workers))) as results:
                        for encoded in results:
                            yield encoded
                            bar.update(sum(result.item.num_samples for result in encoded))
        finally:
            torch.set_num_threads(threads)

    def _encode(
        self, batches: Sequence[list[Item]], encode: Callable[[list[Tensor]], list[Tensor]], workers: int, threads: int
    ) -> Generator[list[Encoded]]:
        if not batches:
            return

        def compute(loaded: list[_Loaded]) -> list[Encoded]:
            waveforms = [item.waveform for item in loaded if item.waveform is not None]
            with torch.no_grad(), torch.autocast(self.env.device.type, torch.bfloat16, enabled=self.bfloat16):
                values = iter(encode(waveforms) if waveforms else [])
            return [
                Encoded(item, None if waveform is None else next(values).cpu().numpy(), error)
                for item, waveform, error in loaded
            ]

        def use_threads() -> None:
            if self.env.device.type == "cpu":
                torch.set_num_threads(threads)

        # Both are closed, or their threads would live as long as an error is held.
        with (
            closing(ahead(self._load, batches, workers=min(4, workers + 1), depth=workers + 1)) as loaded,
            closing(ahead(compute, loaded, workers=workers, depth=2 * workers, initializer=use_threads)) as computed,
        ):
            yield from computed

    def _load(self, batch: list[Item]) -> list[_Loaded]:
        return [self._load_item(item) for item in batch]

    def _load_item(self, item: Item) -> _Loaded:
        try:
            waveform = torch.from_numpy(read_item(item, resample=self.options.resample))
            if conv_length(self.model.feature_extractor.shapes, len(waveform)) < 1:
                raise InputError(f"{item.recording}: {len(waveform)} samples are too short, they do not fill one frame")
        except InputError as error:
            if self.options.on_error == "raise":
                raise
            return _Loaded(item, None, str(error))
        return _Loaded(item, waveform)


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} {unit} of audio, {elapsed} passed, {remaining} left"


def ahead(
    function: Callable[[A], B],
    items: Iterable[A],
    *,
    workers: int,
    depth: int,
    initializer: Callable[[], None] | None = None,
) -> Generator[B]:
    """``map(function, items)`` on threads, in order, at most ``depth`` results ahead of the one that is asked for."""
    pool = ThreadPoolExecutor(workers, initializer=initializer)
    pending: deque[Future[B]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())


def _fingerprint(model: DinoSR) -> str:
    """The beginning of the SHA-256 of what features and units depend on: weights, and what is done with them."""
    shaping = [getattr(model.cfg, name) for name in SHAPING]
    digest = hashlib.sha256(json.dumps(shaping).encode())
    for name, value in model.state_dict().items():
        if not name.startswith(("teacher.", "codebooks.", "current_step", "mask_embedding")):
            digest.update(name.encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]

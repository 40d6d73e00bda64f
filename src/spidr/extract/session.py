"""Encode recordings as fast as the machine allows, each as if it were alone.

The result of a recording must not depend on other recordings, the number of processes or which of them computes it. But
rounding does: a matrix product with more rows may add in another order. So

- on CPUs every recording goes through the model alone, on one thread, as many at once as there are threads. Larger
  batches would not be faster;
- on GPUs recordings of similar length form a padded batch. Features then differ by rounding. A unit could differ where
  two scores are nearly equal, so a recording with such a frame is encoded again, alone.
"""

import hashlib
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from threading import Lock as ThreadLock
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spidr.config import SAMPLE_RATE, may_differ
from spidr.data import audio
from spidr.environment import Environment
from spidr.extract.options import Options
from spidr.extract.smooth import NEAR, Decoder
from spidr.extract.sources import TOO_SHORT, Item, LongRecording, explained
from spidr.models import DinoSR
from spidr.models.hub import load_encoder
from spidr.tools.errors import InputError
from spidr.tools.frames import conv_length, receptive_field
from spidr.tools.progress import Progress
from spidr.tools.waveforms import QUIET, Standardised, standardise

logger = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")

LONG = 120 * SAMPLE_RATE  # longer recordings (in samples) are encoded one by one, each on all threads of a CPU


class Skipped(dict[str, str]):
    """Why recordings could not be encoded, by name."""


class EncodingError(InputError):
    """A recording cannot be encoded."""


Encoded = tuple[Item, Iterable[NDArray[Any]] | str]
"""A recording and its values, in pieces along its frames, or why there are none."""


@dataclass
class Summary:
    """The outcome of this process's recordings: why some were skipped, and how many samples of how many were encoded.

    ``quiet`` are those below -45 dBFS, ``units`` different units, no more of which are added once there are two.
    """

    skipped: Skipped = field(default_factory=Skipped)
    done: int = 0
    samples: int = 0
    quiet: list[str] = field(default_factory=list)
    units: set[int] = field(default_factory=set)

    def skip(self, name: str, why: str) -> None:
        """Note a recording that cannot be encoded."""
        logger.warning("Skipped: %s", why)
        self.skipped[name] = why

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """Join the summaries of all processes."""
        total = cls()
        for part in parts:
            total.skipped.update(part.skipped)
            total.done += part.done
            total.samples += part.samples
            total.quiet += part.quiet
            total.units |= part.units
        return total

    def report(self, output: Path, left: int) -> None:
        """Log the outcome of ``left`` recordings."""
        if not left:
            logger.info("nothing left to do: %s has all of these recordings", output)
            return
        hours = self.samples / SAMPLE_RATE / 3600
        length = f"{hours:.2f} h" if hours >= 1 else f"{60 * hours:.1f} min"
        logger.info("%s: %d recordings (%s) encoded", output, self.done, length)
        if self.skipped:
            logger.warning("%d of %d recordings were skipped", len(self.skipped), left)
        if self.quiet:
            logger.warning(
                "%d recordings are quieter than -45 dBFS, such as %s: standardising adds 1e-5 to the variance, so the "
                "model hears them as quieter than others; if they are speech, raise their volume first",
                len(self.quiet),
                ", ".join(sorted(self.quiet)[:3]),
            )
        if self.done and len(self.units) == 1:
            logger.warning(
                "all frames have unit %d: the recordings are silent, or the model's weights are damaged or untrained",
                *self.units,
            )


class Session:
    """A model that encodes recordings inside a ``with`` block, after which its mode and device are as before.

    It gives features of a layer (None: the model's best) or, if ``discrete``, units: the nearest of the centroids (K,
    D), or else the codebook's. ``penalty`` is the cost of a change of unit (see :class:`spidr.extract.smooth.Decoder`).

    Raises:
        InputError: There is no such model or layer.
    """

    def __init__(
        self,
        model: str | Path | DinoSR,
        layer: int | None,
        options: Options,
        env: Environment,
        *,
        discrete: bool = False,
        centroids: NDArray[np.float32] | None = None,
        penalty: float = 0.0,
    ) -> None:
        self.name = type(model).__name__ if isinstance(model, DinoSR) else str(model)
        self.model = model if isinstance(model, DinoSR) else load_encoder(model, options.model_type)
        self.layer = self.model.best_layer if layer is None else layer
        self.options, self.env, self.discrete, self.penalty = options, env, discrete, penalty
        has_codebook = discrete and centroids is None
        total = len(self.model.student.layers)
        first, having = (self.model.codebook_layers.start, "have a codebook") if has_codebook else (1, "exist")
        if not first <= self.layer <= total:
            lacks = "has no codebook" if 1 <= self.layer <= total else "does not exist"
            default = ", the default," if layer is None else ""
            raise InputError(f"layer {self.layer}{default} {lacks}; layers {first} to {total} {having}")
        self.shapes = self.model.feature_extractor.shapes
        self.shortest = receptive_field(self.shapes)
        self.window = self.model.window_frames(options.window, options.context)
        self.bfloat16 = options.dtype == "bfloat16" or (options.dtype == "auto" and _has_bfloat16(env.device))
        self.summary = Summary()
        self._centroids = None if centroids is None else torch.from_numpy(centroids).to(env.device)
        self._one_window_at_a_time = ThreadLock()
        self._restore = ExitStack()

    def __enter__(self) -> Self:
        self._restore.callback(self.model.to, self.model.mask_embedding.device)
        self._restore.enter_context(self.model.to(self.env.device).inference())
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def settings(self) -> dict[str, Any]:
        """Settings that the values depend on, and the model's name."""
        made = {
            "model": self.name,
            "weights": _fingerprint(self.model),
            "layer": self.layer,
            "dtype": "bfloat16" if self.bfloat16 else "float32",
            "window": self.options.window,
            "context": self.options.context,
            "resample": self.options.resample,
            "frame_seconds": self.model.frame_seconds,
        }
        if self.discrete:
            made["num_units"] = self.model.cfg.codebook_size if self._centroids is None else len(self._centroids)
            if self.penalty:
                made["smooth"] = self.penalty
        return made

    def num_frames(self, num_samples: int) -> int:
        """Frames that samples make."""
        return conv_length(self.shapes, num_samples)

    # ------------------------------------------------------------------------------------------------- one batch

    def _values(self, features: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Projected features to the layer's features (B, T, D), or to scores of units (B, T, V), highest best."""
        if self.discrete and self._centroids is None:
            return self.model.unit_logits(features, attention_mask, self.layer).float()
        output = self.model.layer_output(features, attention_mask, self.layer).float()
        if self._centroids is None:
            return output
        with torch.autocast(output.device.type, enabled=False):  # negative squared distance, plus that to the origin
            return 2 * output @ self._centroids.T - self._centroids.square().sum(-1)

    def _compute(self, waveforms: list[Tensor]) -> list[Tensor]:
        """Values of some recordings, (T, …) each."""
        sizes, device = [len(waveform) for waveform in waveforms], self.env.device
        lengths = torch.tensor(sizes, device=device) if len(sizes) > 1 else None
        padded = pad_sequence(waveforms, batch_first=True).to(device, self.model.mask_embedding.dtype)
        with self._computing():
            values = self._values(*self.model.project(standardise(padded, lengths), lengths=lengths))
        return [row[: self.num_frames(size)] for row, size in zip(values, sizes, strict=True)]

    def _windows(self, recording: LongRecording, item: Item) -> Iterator[Tensor]:
        """Values of a recording, (T, …) a window at a time."""
        assert self.window is not None

        def read(start: int, stop: int) -> Tensor:
            samples = torch.from_numpy(recording.read(start, stop)).unsqueeze(0)
            return samples.to(self.env.device, self.model.mask_embedding.dtype)

        standardised = Standardised(read, len(recording))
        self._note_level(item, standardised.std)
        size, context = self.window
        windows = self.model.windows(standardised, len(recording), self._values, size=size, context=context)
        while True:
            with self._one_window_at_a_time, self._computing():
                values = next(windows, None)
            if values is None:
                return
            yield values[0]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with self.model.inference(), torch.autocast(self.env.device.type, torch.bfloat16, enabled=self.bfloat16):
            yield

    def _units(self, pieces: Iterable[Tensor], item: Item, batched: Tensor | None = None) -> NDArray[np.int32]:
        """Best units; of a waveform from a batch, those it has alone."""
        decoder, found, nearly_tied = Decoder(self.penalty), [], False
        for scores in pieces:
            _check_finite(scores, item)
            if self.penalty:
                decoder.add(scores.cpu().numpy())
                continue
            if batched is not None:
                first, second = scores.topk(2).values.unbind(-1)
                nearly_tied |= bool((first - second < NEAR * (1 + first - scores.amin(-1))).any())
            found.append(scores.argmax(-1).cpu().numpy().astype(np.int32))
        units = decoder.units() if self.penalty else np.concatenate(found)
        if batched is not None and (nearly_tied or decoder.nearly_tied):  # other rounding could have changed them
            return self._units(self._compute([batched]), item)
        if len(self.summary.units) < 2:
            self.summary.units.update(np.unique(units).tolist())
        return units

    def _encode(self, loaded: list[tuple[Item, Tensor | LongRecording | str]]) -> list[Encoded]:
        """Encode a batch."""
        waveforms = [source for _, source in loaded if isinstance(source, Tensor)]
        values = iter(self._compute(waveforms) if waveforms else [])
        batched, found = len(waveforms) > 1 and not self.bfloat16, list[Encoded]()
        for item, source in loaded:
            if isinstance(source, str):
                found.append((item, source))
                continue
            whole = source if isinstance(source, Tensor) else None
            pieces = [next(values)] if isinstance(source, Tensor) else self._windows(source, item)
            try:
                if self.discrete:
                    arrays: Iterable[NDArray[Any]] = [self._units(pieces, item, whole if batched else None)]
                else:
                    arrays = _arrays(pieces, item) if whole is None else list(_arrays(pieces, item))
                found.append((item, arrays))
            except InputError as error:
                found.append((item, self.or_raise(error)))
        return found

    def or_raise(self, error: InputError) -> str:
        """Return an error's message if recordings with errors are skipped; raise it otherwise."""
        if self.options.on_error == "raise":
            raise explained(error) from None
        return str(explained(error))

    def _note_level(self, item: Item, std: float) -> None:
        if std * std < QUIET:
            self.summary.quiet.append(item.name)

    # ------------------------------------------------------------------------------------------------- all of them

    def encode(
        self, items: Sequence[Item], use: Callable[[Item, Iterable[NDArray[Any]]], None], what: str, *, writers: int = 1
    ) -> None:
        """Encode this process's share of the recordings of all processes.

        ``use`` is called with each of them and its values, on ``writers`` threads; ``what`` describes the progress bar.

        Raises:
            InputError: A recording cannot be encoded, unless they are to be skipped.
        """

        def use_all(batch: list[Encoded]) -> list[Encoded]:
            return list(map(use_one, batch))

        def use_one(encoded: Encoded) -> Encoded:
            item, pieces = encoded
            try:
                if not isinstance(pieces, str):
                    use(item, pieces)
            except EncodingError as error:  # a long recording is encoded meanwhile
                return item, self.or_raise(error)
            return encoded

        results = self.run(self._plan(items), what)
        with closing(results), closing(ahead(use_all, results, workers=writers, depth=writers)) as used:
            for item, pieces in chain.from_iterable(used):
                if isinstance(pieces, str):
                    self.summary.skip(item.name, pieces)
                else:
                    self.summary.done += 1
                    self.summary.samples += item.num_samples

    def _plan(self, items: Sequence[Item]) -> list[list[Item]]:
        """Make batches, long recordings first: the same list for any number of processes.

        A recording of unknown length is a batch of its own, as it may be longer than a batch or a window.
        """
        seconds = self.options.batch_seconds
        if seconds is None:
            seconds = 0.0 if self.env.device.type == "cpu" else 240.0
        batches: list[list[Item]] = []
        for item in sorted(items, key=lambda item: (-item.num_samples, item.name)):
            longest = batches[-1][0].num_samples if batches else 0
            fits = item.num_samples > 0 and bool(batches) and (len(batches[-1]) + 1) * longest <= seconds * SAMPLE_RATE
            if fits and not self._is_long(batches[-1][0]):
                batches[-1].append(item)
            else:
                batches.append([item])
        return batches

    def _is_long(self, item: Item) -> bool:
        if self.window is None:
            return False
        return item.num_samples == 0 or self.num_frames(item.num_samples) > self.window[0]

    def run(self, batches: Sequence[list[Item]], description: str) -> Generator[list[Encoded]]:
        """Encode this process's share of the batches of all processes, in order."""
        batches = batches[self.env.rank :: self.env.world_size]
        threads, on_cpu = torch.get_num_threads(), self.env.device.type == "cpu"
        at_once = (self.options.threads or threads) if on_cpu else 1
        long = [batch for batch in batches if at_once > 1 and batch[0].num_samples > LONG]
        # Rank 0 shows its own share; the others' shares take about as long.
        shown = self.options.progress and self.env.rank == 0
        total = sum(item.num_samples for batch in batches for item in batch)
        unit, seconds = ("h of audio", 3600) if total >= 3600 * SAMPLE_RATE else ("min of audio", 60)
        try:
            with closing(Progress(description, total, unit, 1 / seconds / SAMPLE_RATE, shown=shown)) as advance:
                for group, most in ((long, 1), (batches[len(long) :], at_once)):
                    workers = max(1, min(most, len(group)))
                    with closing(self._run_group(group, workers, at_once // workers)) as results:
                        for encoded in results:
                            yield encoded
                            advance(sum(item.num_samples for item, _ in encoded))
        finally:
            torch.set_num_threads(threads)

    def _run_group(self, batches: Sequence[list[Item]], workers: int, threads: int) -> Generator[list[Encoded]]:
        def begin() -> None:
            if self.env.device.type == "cpu":
                torch.set_num_threads(threads)
            elif self.env.device.type == "cuda":
                torch.cuda.set_device(self.env.device)  # is of each thread

        def load(batch: list[Item]) -> list[tuple[Item, Tensor | LongRecording | str]]:
            return [(item, self._load(item)) for item in batch]

        # Otherwise their threads would live as long as an error is held.
        with (
            closing(ahead(load, batches, workers=min(4, workers + 1), depth=workers + 1)) as loaded,
            closing(ahead(self._encode, loaded, workers=workers, depth=2 * workers, initializer=begin)) as encoded,
        ):
            yield from encoded

    def _load(self, item: Item) -> Tensor | LongRecording | str:
        """A waveform, a long recording, or why there is none."""
        where, resample = item.recording, self.options.resample
        try:
            if self._is_long(item):
                source: Tensor | LongRecording = LongRecording(where, resample=resample)
            else:
                source = torch.from_numpy((audio.read_resampled if resample else audio.read_audio)(where))
            size, promised = len(source), item.promised
            # libsndfile does not report a truncated WAV. Lengths of spidr 0.1.2 are rounded: off by at most one.
            if promised and not resample and abs(promised - size) > 1:
                told = f"{size} samples, the manifest says {promised}: truncated or changed since"
                raise InputError(f"{where}: {told}; write the manifest again.")
            if self.num_frames(size) < 1:
                raise InputError(f"{where}: {size} samples are {TOO_SHORT}")
        except InputError as error:
            return self.or_raise(error)
        if isinstance(source, Tensor):
            self._note_level(item, float(source.std(correction=0)))
        return source


def ahead(
    function: Callable[[A], B],
    items: Iterable[A],
    *,
    workers: int,
    depth: int,
    initializer: Callable[[], None] | None = None,
) -> Generator[B]:
    """``map(function, items)`` on threads, in order, at most ``depth`` results ahead."""
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


def _arrays(pieces: Iterable[Tensor], item: Item) -> Iterator[NDArray[np.float32]]:
    try:
        for values in pieces:
            _check_finite(values, item)
            yield values.cpu().numpy()
    except InputError as error:  # long recordings are read while their features are written
        raise EncodingError(str(error)) from None


def _check_finite(values: Tensor, item: Item) -> None:
    if not math.isfinite(float(values.sum(dtype=torch.float64 if values.device.type == "cpu" else None))):
        raise InputError(
            f"{item.recording}: the model's features of it are not finite. Are the model's weights damaged?"
        )


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _fingerprint(model: DinoSR) -> str:
    """Start of the SHA-256 of all weights and settings that features and units depend on."""
    names = [f.name for f in fields(model.cfg) if not may_differ(f.name) and f.name != "train_layers"]
    digest = hashlib.sha256(json.dumps([getattr(model.cfg, name) for name in names]).encode())
    for name, value in model.state_dict().items():
        if not name.startswith(("teacher.", "codebooks.", "current_step", "mask_embedding")):
            digest.update(name.encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]

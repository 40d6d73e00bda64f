"""Loaders: the batches of an epoch, made by worker processes."""

import logging
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Self

import polars as pl
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from spidr.config import DEFAULT_CONV_LAYER_CONFIG, DataConfig, MaskingConfig
from spidr.data.batch import Batch, BatchRequest, Collator, PackedBatch, UnreadableBatchError
from spidr.data.dataset import SpeechDataset
from spidr.data.manifest import read_manifests
from spidr.data.measure import with_lengths
from spidr.data.sampler import BatchList, BatchSampler, sorted_batches
from spidr.data.summary import DataSummary, summarise
from spidr.tools.errors import InputError, first_line
from spidr.tools.frames import receptive_field

logger = logging.getLogger(__name__)

WORKER_GRACE = 600  # seconds a worker process outlives a SIGTERM


def build_dataloader(
    data_cfg: DataConfig,
    mask_cfg: MaskingConfig | None,
    *,
    conv_layer_config: Sequence[tuple[int, int, int]] | None = None,
    channels: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> "SpeechLoader":
    """Build the batches to train on.

    Batches, crops and masks are functions of (seed, epoch, number of the batch), whatever the number of workers. Their
    order is that of :class:`spidr.data.sampler.BatchSampler`; processes take turns.

    Args:
        data_cfg: The manifests and how batches are made from them.
        mask_cfg: The masks; None: no masks.
        conv_layer_config: (out_channels, kernel, stride) of the feature extractor's convolutions; None: the default.
        channels: Number of feature channels, needed when ``mask_channel_prob`` is above 0.
        rank: This process's rank; None: its rank in the process group, or 0.
        world_size: Number of processes; None: that of the process group, or 1.

    Raises:
        InputError: A manifest cannot be read or gives no batch, or ``global_batch_length`` is impossible.
    """
    rank, world_size = place(rank, world_size)
    accumulation = _accumulation(data_cfg, world_size)
    dataset, sources, collator = _parts(data_cfg, mask_cfg, conv_layer_config, channels)
    sizes = {"shortest": collator.cfg.min_sample_size, "world_size": world_size, "accumulation": accumulation}
    sampler = BatchSampler(dataset.lengths, data_cfg, sources=sources.to_numpy(), **sizes)
    return SpeechLoader(dataset, collator, sampler.epoch, rank, world_size, accumulation)


def build_validation_dataloader(
    data_cfg: DataConfig,
    mask_cfg: MaskingConfig | None,
    *,
    conv_layer_config: Sequence[tuple[int, int, int]] | None = None,
    channels: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> "SpeechLoader":
    """Build the batches to validate on: always the same, each recording once, from shortest to longest.

    Crops and masks are seeded by the row of the manifest. Batch i goes to process ``i % world_size``, so a process may
    get one batch fewer than another. For the arguments, see :func:`build_dataloader`.
    """
    dataset, _, collator = _parts(data_cfg, mask_cfg, conv_layer_config, channels)
    batches = sorted_batches(dataset.lengths, collator.cfg)
    return SpeechLoader(dataset, collator, lambda _: batches, *place(rank, world_size), seed_by_row=True)


def _parts(
    cfg: DataConfig,
    mask_cfg: MaskingConfig | None,
    conv_layer_config: Sequence[tuple[int, int, int]] | None,
    channels: int | None,
) -> tuple[SpeechDataset, pl.Series, Collator]:
    """The recordings, the manifest each is from, and the collator, which takes those long enough for a frame."""
    conv_layer_config = conv_layer_config or DEFAULT_CONV_LAYER_CONFIG
    samples = receptive_field(conv_layer_config)
    if cfg.max_sample_size < samples:
        raise InputError(f"max_sample_size is {cfg.max_sample_size}; one frame of the model needs {samples} samples.")
    cfg = replace(cfg, min_sample_size=max(cfg.min_sample_size, samples))
    collator = Collator(cfg, mask_cfg, conv_layer_config, channels)
    manifest, sources = read_manifests(cfg.manifests, needs_audio=True)
    manifest = with_lengths(manifest, " ".join(cfg.manifests))
    return SpeechDataset(manifest, normalize=cfg.normalize), sources, collator


def _accumulation(cfg: DataConfig, world_size: int) -> int:
    """Batches per process and optimizer step for ``global_batch_length``."""
    if cfg.global_batch_length is None:
        return 1
    per_step = cfg.max_batch_length * world_size
    accumulation, rest = divmod(cfg.global_batch_length, per_step)
    if accumulation < 1 or rest:
        nearest = [str(n * per_step) for n in (accumulation, accumulation + 1) if n > 0]
        raise InputError(
            f"global_batch_length = {cfg.global_batch_length} is not a multiple of max_batch_length * processes = "
            f"{cfg.max_batch_length} * {world_size}. Nearest valid: {' or '.join(nearest)}."
        )
    return accumulation


def place(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """This process's rank and the number of processes; None is replaced from the process group, if any."""
    own = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    return own[0] if rank is None else rank, own[1] if world_size is None else world_size


class SpeechLoader:
    """This process's batches, epoch by epoch.

    Attributes:
        dataset: The recordings.
        accumulation: This process's batches per optimizer step.
        skipped: With ``on_error = "skip"``, how often each unreadable file was replaced in this process's batches.
        generator: Its ``initial_seed()`` seeds crops and masks, so ``manual_seed`` changes or repeats them.
        batch_sampler: The loader itself, since users look for :meth:`set_epoch` there.
    """

    def __init__(
        self,
        dataset: SpeechDataset,
        collator: Collator,
        batches: Callable[[int], BatchList],
        rank: int,
        world_size: int,
        accumulation: int = 1,
        *,
        seed_by_row: bool = False,
    ) -> None:
        self.dataset, self.accumulation = dataset, accumulation
        self.skipped: Counter[str] = Counter()
        self._rank, self._world_size, self._lengths = rank, world_size, dataset.lengths
        self.generator = torch.Generator().manual_seed(collator.cfg.random_seed)
        self._collator, self._seed_by_row = collator, seed_by_row
        # An epoch's list is large, and needed several times in a row.
        self._list = lru_cache(maxsize=1)(batches)
        self._workers = _Workers(collator, world_size)
        # Also at exit, before Python would wait for processes that nobody has told to end.
        weakref.finalize(self, self._workers.close)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of ``iter`` and ``len``."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Number of this process's batches in the current epoch."""
        return len(self._numbers(self._epoch))

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(self._epoch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's batches of an epoch, ``accumulation`` for each step, from step ``start`` on.

        One epoch at a time: a new one ends the previous one. A recording that cannot be read is an InputError, unless
        ``on_error`` is "skip".
        """
        made = self._workers.make(self.requests(epoch, start))
        for number, batch in zip(self._numbers(epoch, start), made, strict=False):
            if isinstance(batch, UnreadableBatchError):
                batch = self._another(epoch, number, batch)
            if isinstance(batch, InputError):
                raise batch
            for file, reason in batch.skipped.items():
                if file not in self.skipped:
                    logger.warning("Skipped: %s", reason)
                self.skipped[file] += 1
            yield batch

    def _another(self, epoch: int, number: int, error: UnreadableBatchError) -> Batch | InputError:
        """A replacement for an unreadable batch: the next readable one of the epoch, of up to 1,000."""
        skipped, count = dict(error.skipped), len(self._batches(epoch))
        for other in range(number + 1, number + min(count, 1000)):
            try:
                batch = self._collator(self._request(epoch, other % count))
            except UnreadableBatchError as another:
                skipped |= another.skipped
            else:
                return replace(batch, skipped=skipped | batch.skipped)
        return error

    def summary(self) -> DataSummary:
        """Summarise what epoch 0 uses of the recordings."""
        return summarise(self._lengths, self._collator.cfg, self._collator.cfg.min_sample_size, self._batches(0))

    @property
    def batch_sampler(self) -> Self:
        """See the attributes."""
        return self

    def close(self) -> None:
        """Stop the worker processes. Iterating again starts new ones."""
        self._workers.close()

    def _numbers(self, epoch: int, start: int = 0) -> range:
        """Numbers of this process's batches in the epoch's list."""
        first = start * self._world_size * self.accumulation + self._rank
        return range(first, len(self._batches(epoch)), self._world_size)

    def _batches(self, epoch: int) -> BatchList:
        return self._list(self._original(epoch))

    def _original(self, epoch: int) -> int:
        """The epoch whose batches this one repeats, or itself."""
        distinct = self._collator.cfg.num_distinct
        return epoch % distinct if distinct else epoch

    def requests(self, epoch: int, start: int) -> Iterator[BatchRequest]:
        """Requests for this process's batches, from optimizer step ``start`` of the epoch on."""
        return (self._request(epoch, number) for number in self._numbers(epoch, start))

    def _request(self, epoch: int, number: int) -> BatchRequest:
        rows = self._batches(epoch)[number]
        seed, recordings = self.generator.initial_seed(), self.dataset.recordings(rows)
        if self._seed_by_row:
            return BatchRequest(rows, self._lengths[rows], recordings, seed, None)
        original = self._original(epoch)
        again = None if epoch == original else (epoch, number)
        return BatchRequest(rows, self._lengths[rows], recordings, seed, (original, number), again)


def _has_shared_memory(cfg: DataConfig, processes: int) -> bool:
    """Whether batches can travel as tensors; containers may lack shared memory, and socket names are short."""
    needed = 4 * cfg.max_batch_length * cfg.num_workers * (cfg.prefetch_factor + 1) * processes
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:  # not Linux
        return True
    return free > 2 * needed and len(tempfile.gettempdir()) < 60


class _Maker(Dataset[Batch | PackedBatch | InputError]):
    """Runs in the workers. Errors travel as values, since torch would wrap an exception and spoil its message."""

    def __init__(self, collator: Collator, *, packed: bool) -> None:
        self.collator, self.packed = collator, packed

    def __getitem__(self, request: BatchRequest) -> Batch | PackedBatch | InputError:
        try:
            batch = self.collator(request)
            return PackedBatch(batch) if self.packed else batch
        except InputError as error:
            return error


class _Workers:
    """The processes that make batches, started on first use. Requests are complete, so workers keep no state."""

    def __init__(self, collator: Collator, processes: int) -> None:
        self._collator, self._processes = collator, processes
        self._requests: Iterator[BatchRequest] = iter(())
        self._dataloader: DataLoader[Batch | PackedBatch | InputError] | None = None
        self._running: Generator[Batch | InputError] | None = None
        self._watched: Callable[[], Any] = lambda: None

    def __iter__(self) -> Iterator[BatchRequest]:
        return self._requests  # the loader's sampler

    def make(self, requests: Iterator[BatchRequest]) -> Iterator[Batch | InputError]:
        """Make batches. This ends the previous call."""
        if self._running is not None:
            self._running.close()
        self._running = self._make(requests)
        return self._running

    def _make(self, requests: Iterator[BatchRequest]) -> Generator[Batch | InputError]:
        if self._dataloader is None:
            self._dataloader = self._build()
        self._requests = requests
        batches: Any = self._dataloader._iterator  # of the epoch before, whose workers may live on, or None
        try:
            batches = iter(self._dataloader)
            self._watch(batches)
            for batch in batches:
                yield batch.open() if isinstance(batch, PackedBatch) else batch
        except (RuntimeError, EOFError, OSError) as error:  # the error depends on what the worker was sending
            workers = getattr(batches, "_workers", ())
            if not multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1):
                raise
            batches._shutdown_workers()
            raise InputError(
                f"A data worker died: {first_line(error).rstrip('.')}. If the machine ran out of memory, lower "
                "data.num_workers, data.prefetch_factor or data.max_batch_length."
            ) from None

    def _watch(self, batches: Any) -> None:
        """Stop waiting for the rest of a batch that a worker was sending when it died.

        This replaces torch's signal handler, which raises in the main thread, wherever that is, and in no other one.
        """
        if self._watched() is not batches and (workers := getattr(batches, "_workers", None)):
            self._watched = weakref.ref(batches)
            torch._C._remove_worker_pids(id(batches))
            batches._worker_pids_set = False
            watcher = partial(_end_with_worker, self._watched, workers, batches._worker_result_queue)
            threading.Thread(target=watcher, name="data workers", daemon=True).start()

    def _build(self) -> DataLoader[Batch | PackedBatch | InputError]:
        cfg = self._collator.cfg
        packed = cfg.num_workers > 0 and not _has_shared_memory(cfg, self._processes)
        if packed:
            logger.info("data workers do without shared memory: there is little, or TMPDIR has a long name")
        return DataLoader(
            _Maker(self._collator, packed=packed),
            batch_size=None,
            sampler=self,
            num_workers=cfg.num_workers,
            prefetch_factor=cfg.prefetch_factor if cfg.num_workers else None,
            persistent_workers=cfg.persistent_workers and cfg.num_workers > 0,
            # Automatic if the model is on a GPU; on request, if there is a GPU.
            pin_memory=torch.cuda.is_available() and (cfg.pin_memory or torch.cuda.is_initialized()),
            worker_init_fn=_begin_worker,
            # Torch draws a seed here at each epoch, which must not come from dropout's generator.
            generator=torch.Generator(),
        )

    def close(self) -> None:
        if self._running is not None:
            self._running.close()
        # Torch ends the processes when nothing refers to their loader.
        self._running = self._dataloader = None


def _end_with_worker(batches: Callable[[], Any], workers: list[Any], results: Any) -> None:
    """When one worker has died, end all, so that readers of ``results``, their queue, reach its end.

    ``batches`` gives torch's iterator, or None if it is gone.
    """
    multiprocessing.connection.wait([worker.sentinel for worker in workers])
    if (iterator := batches()) is not None and not iterator._shutdown:
        for worker in workers:
            worker.kill()
        results._writer.close()


def _begin_worker(_: int) -> None:
    """Leave signals to the main process: clusters send them to all, and it needs batches to stop properly.

    A worker ends when told to, when its parent is gone or, if both fail, some time after a SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Torch only watches the process that started this one, which may be a server that lives on."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)

"""Batches of an epoch, made by worker processes: what a training loop iterates over."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import weakref
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from spidr.config import DEFAULT_CONV_LAYER_CONFIG, DataConfig, MaskingConfig
from spidr.data.batch import Batch, BatchRequest, Collator
from spidr.data.dataset import SpeechDataset
from spidr.data.manifest import read_manifest
from spidr.data.measure import with_lengths
from spidr.data.sampler import BatchList, BatchSampler, sorted_batches
from spidr.tools.errors import InputError
from spidr.tools.frames import receptive_field

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

logger = logging.getLogger(__name__)

WORKER_GRACE = 30
"""Seconds a worker process outlives a SIGTERM."""


def build_dataloader(
    data_cfg: DataConfig,
    mask_cfg: MaskingConfig | None,
    *,
    conv_layer_config: Sequence[tuple[int, int, int]] | None = None,
    channels: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int | None = None,
    start_method: str | None = None,
) -> SpeechLoader:
    """Batches to train on.

    Batches, crops and masks are functions of (seed, epoch, number of the batch), whatever the number of workers. The
    order of the batches is that of :class:`spidr.data.sampler.BatchSampler`, dealt in turn to the processes.

    Args:
        data_cfg: The manifest and how batches are made from it.
        mask_cfg: The masks; None: no masks.
        conv_layer_config: (out_channels, kernel, stride) of the feature extractor's convolutions; None: the default.
        channels: Number of feature channels, needed when ``mask_channel_prob`` is above 0.
        rank: This process's number.
        world_size: Number of processes.
        accumulation: Batches of this process per optimiser step; None: derived from ``data_cfg.global_batch_length``.
        start_method: How workers are started: "fork", "spawn" or "forkserver"; None: Python's default.

    Raises:
        InputError: The manifest cannot be read or gives no batch, or ``global_batch_length`` cannot be had.
    """
    conv_layer_config = conv_layer_config or DEFAULT_CONV_LAYER_CONFIG
    usable = _with_one_frame(data_cfg, conv_layer_config)
    if accumulation is None:
        accumulation = _accumulation(data_cfg, world_size)
    collator = Collator(usable, mask_cfg, conv_layer_config, channels)
    manifest = with_lengths(read_manifest(data_cfg.manifest), data_cfg.manifest)
    dataset = SpeechDataset(manifest, normalize=data_cfg.normalize)
    lengths = dataset.manifest["num_samples"].to_numpy()
    shortest = usable.min_sample_size
    sampler = BatchSampler(lengths, data_cfg, shortest=shortest, world_size=world_size, accumulation=accumulation)
    processes = _Processes(rank, world_size, accumulation)
    return SpeechLoader(dataset, collator, sampler.epoch, processes, start_method=start_method)


def build_validation_dataloader(
    data_cfg: DataConfig,
    mask_cfg: MaskingConfig | None,
    *,
    conv_layer_config: Sequence[tuple[int, int, int]] | None = None,
    channels: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    start_method: str | None = None,
) -> SpeechLoader:
    """Batches to validate on: always the same, each recording once, from the shortest to the longest.

    Crops and masks are seeded by the row of the manifest. Batch i goes to process ``i % world_size``, so a process may
    get one batch less than another. Arguments and errors are those of :func:`build_dataloader`.
    """
    conv_layer_config = conv_layer_config or DEFAULT_CONV_LAYER_CONFIG
    data_cfg = _with_one_frame(data_cfg, conv_layer_config)
    collator = Collator(data_cfg, mask_cfg, conv_layer_config, channels)
    manifest = with_lengths(read_manifest(data_cfg.manifest), data_cfg.manifest)
    dataset = SpeechDataset(manifest, normalize=data_cfg.normalize)
    batches = sorted_batches(dataset.manifest["num_samples"].to_numpy(), data_cfg)
    processes = _Processes(rank, world_size)
    return SpeechLoader(dataset, collator, lambda _: batches, processes, seed_by_row=True, start_method=start_method)


def _with_one_frame(cfg: DataConfig, conv_layer_config: Sequence[tuple[int, int, int]]) -> DataConfig:
    """Leave out recordings of which the model makes no frame."""
    samples = receptive_field(conv_layer_config)
    if cfg.max_sample_size < samples:
        raise InputError(f"max_sample_size is {cfg.max_sample_size}; one frame of the model needs {samples} samples.")
    return replace(cfg, min_sample_size=max(cfg.min_sample_size, samples))


def _accumulation(cfg: DataConfig, world_size: int) -> int:
    """Batches per process and optimiser step for ``global_batch_length``."""
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


class _Processes(NamedTuple):
    """How batches are dealt: a round has ``accumulation`` batches for each of ``world_size`` processes."""

    rank: int
    world_size: int
    accumulation: int = 1


class SpeechLoader:
    """This process's batches, epoch by epoch.

    Attributes:
        dataset: The recordings.
        accumulation: Batches of this process per optimiser step.
        skipped: With ``on_error = "skip"``, how often each unreadable file was replaced in this process's batches.
    """

    def __init__(
        self,
        dataset: SpeechDataset,
        collator: Collator,
        batches: Callable[[int], BatchList],
        processes: _Processes,
        *,
        seed_by_row: bool = False,
        start_method: str | None = None,
    ) -> None:
        self.dataset = dataset
        self.accumulation = processes.accumulation
        self.skipped: Counter[str] = Counter()
        self._processes = processes
        self._lengths = dataset.manifest["num_samples"].to_numpy()
        self._seed, self._seed_by_row = collator.cfg.random_seed, seed_by_row
        # An epoch's list is needed several times in a row, and large.
        self._batches = lru_cache(maxsize=1)(batches)
        self._workers = _Workers(collator, start_method)
        # Also at exit, and then before Python would wait for processes that nobody told to end.
        weakref.finalize(self, self._workers.close)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that ``iter`` and ``len`` are about."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Number of this process's batches in the current epoch."""
        return len(self._numbers(self._epoch))

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(self._epoch)

    def steps_in_epoch(self, epoch: int) -> int:
        """Number of optimiser steps (rounds) in an epoch."""
        return -(-len(self._batches(epoch)) // (self._processes.world_size * self.accumulation))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's batches of an epoch, ``accumulation`` for each step, from step ``start`` on.

        One epoch at a time: a new one ends the one before.

        Raises:
            InputError: A recording cannot be read, unless ``on_error`` is "skip".
        """
        for batch in self._workers.make(self._requests(epoch, start)):
            if isinstance(batch, InputError):
                raise batch
            for file, reason in batch.skipped.items():
                if file not in self.skipped:
                    logger.warning("Skipped: %s", reason)
                self.skipped[file] += 1
            yield batch

    def close(self) -> None:
        """Stop the worker processes. Iterating again starts new ones."""
        self._workers.close()

    def _numbers(self, epoch: int, start: int = 0) -> range:
        """Numbers of this process's batches in the epoch's list."""
        rank, world_size, accumulation = self._processes
        return range(start * world_size * accumulation + rank, len(self._batches(epoch)), world_size)

    def _requests(self, epoch: int, start: int) -> Iterator[BatchRequest]:
        batches = self._batches(epoch)
        for number in self._numbers(epoch, start):
            rows = batches[number]
            key = None if self._seed_by_row else (epoch, number)
            yield BatchRequest(rows, self._lengths[rows], self.dataset.recordings(rows), self._seed, key)


class _Maker(Dataset[Batch | InputError]):
    """Runs in the workers. Errors travel as values: torch would wrap an exception and spoil its message."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __getitem__(self, request: BatchRequest) -> Batch | InputError:
        try:
            return self.collator(request)
        except InputError as error:
            return error


class _Queue(Sampler[BatchRequest]):
    """What the workers are to do next. Requests say all there is to know, so workers need no news of the epoch."""

    def __init__(self) -> None:
        self.requests: Iterator[BatchRequest] = iter(())

    def __iter__(self) -> Iterator[BatchRequest]:
        return self.requests


class _Workers:
    """The processes that make batches, started when they are first needed."""

    def __init__(self, collator: Collator, start_method: str | None) -> None:
        self._collator = collator
        self._start_method = start_method
        self._queue = _Queue()
        self._dataloader: DataLoader[Batch | InputError] | None = None
        self._running: Generator[Batch | InputError] | None = None

    def make(self, requests: Iterator[BatchRequest]) -> Iterator[Batch | InputError]:
        """Make batches; the previous call's come to an end."""
        if self._running is not None:
            self._running.close()
        self._running = self._make(requests)
        return self._running

    def _make(self, requests: Iterator[BatchRequest]) -> Generator[Batch | InputError]:
        if self._dataloader is None:
            self._dataloader = self._build()
        self._queue.requests = requests
        yield from self._dataloader

    def _build(self) -> DataLoader[Batch | InputError]:
        cfg = self._collator.cfg
        return DataLoader(
            _Maker(self._collator),
            batch_size=None,
            sampler=self._queue,
            num_workers=cfg.num_workers,
            prefetch_factor=cfg.prefetch_factor if cfg.num_workers else None,
            persistent_workers=cfg.persistent_workers and cfg.num_workers > 0,
            multiprocessing_context=self._start_method if cfg.num_workers else None,
            pin_memory=cfg.pin_memory and torch.cuda.is_available(),
            collate_fn=_unchanged,
            worker_init_fn=_begin_worker,
            # Torch draws a seed here at each epoch: not from the generator that dropout depends on.
            generator=torch.Generator(),
        )

    def close(self) -> None:
        if self._running is not None:
            self._running.close()
        # Torch ends the processes when nothing refers to their loader any more.
        self._running = self._dataloader = None


def _unchanged(batch: Any) -> Any:
    return batch


def _begin_worker(_: int) -> None:
    """Leave signals to the main process: clusters send them to all, and it still needs batches to stop in good order.

    A worker ends when it is told to, when its parent is gone or, should both fail, some time after a SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Torch looks for the process that started this one, which may be a server that goes on."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)

"""Loaders: the same batches for any number of workers and processes, and errors that reach the user."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from helpers.slurm_cluster import is_running, wait_for
from spidr.config import DataConfig, MaskingConfig
from spidr.data import Batch, build_dataloader, build_validation_dataloader, speech_dataset
from spidr.data.batch import PackedBatch
from spidr.data.sampler import BatchSampler
from spidr.tools.errors import InputError

LENGTHS = [1000 + 137 * i for i in range(40)]


@pytest.fixture
def cfg(recordings: Callable[..., Path]) -> DataConfig:
    return DataConfig(
        str(recordings(LENGTHS)),
        num_workers=0,
        num_buckets=4,
        min_sample_size=1200,
        max_sample_size=5000,
        max_batch_length=20_000,
    )


def identical(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) > 0 and all(
        torch.equal(a.waveforms, b.waveforms)
        and torch.equal(a.rows, b.rows)
        and torch.equal(a.mask_indices, b.mask_indices)
        for a, b in zip(left, right, strict=True)
    )


def children() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid is not None}


@pytest.fixture
def own_children() -> Callable[[], set[int]]:
    """The processes this test has started: workers of an earlier test may live until its loader is collected."""
    others = children()
    return lambda: children() - others


@pytest.fixture
def start_method(request: pytest.FixtureRequest) -> Iterator[None]:
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize(
    ("workers", "start_method", "persistent"),
    [(1, "fork", 1), (8, "fork", 1), (1, "fork", 0), (8, "fork", 0), (1, "spawn", 1), (1, "forkserver", 1)],
    indirect=["start_method"],
)
def test_same_batches_for_any_number_of_workers(
    cfg: DataConfig, workers: int, start_method: None, persistent: int
) -> None:
    alone = build_dataloader(cfg, MaskingConfig())
    other = build_dataloader(replace(cfg, num_workers=workers, persistent_workers=bool(persistent)), MaskingConfig())
    for epoch in (0, 1, 0):
        assert identical(list(alone.epoch(epoch)), list(other.epoch(epoch)))
    other.close()
    assert not identical(list(alone.epoch(0)), list(alone.epoch(1)))


def test_every_recording_once(cfg: DataConfig) -> None:
    loader = build_dataloader(cfg, MaskingConfig())
    rows = sorted(row for batch in loader for row in batch.rows.tolist())
    assert rows == [row for row, length in enumerate(LENGTHS) if length >= 1200]


def test_buckets_do_not_depend_on_the_model(cfg: DataConfig) -> None:
    """Recordings too short for one frame are skipped; the buckets are the configuration's."""
    loader = build_dataloader(cfg, None, conv_layer_config=[(8, 2500, 10)])
    expected = BatchSampler(np.array(LENGTHS), cfg, shortest=2500).epoch(0)
    assert [batch.rows.tolist() for batch in loader] == [rows.tolist() for rows in expected]
    assert min(LENGTHS[row] for batch in loader for row in batch.rows.tolist()) == 1000 + 137 * 11


def test_published_usage(cfg: DataConfig) -> None:
    loader = build_dataloader(cfg, MaskingConfig())
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(loader) == len(batches)
        assert identical(batches, list(loader.epoch(epoch)))
    waveforms, attention_mask, mask = next(iter(loader))
    assert attention_mask is None
    assert mask.shape[0] == waveforms.shape[0]


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_interleave_to_one(cfg: DataConfig, world_size: int, accumulation: int) -> None:
    cfg = replace(cfg, global_batch_length=world_size * accumulation * cfg.max_batch_length)
    one = build_dataloader(cfg, MaskingConfig())
    ranks = [build_dataloader(cfg, MaskingConfig(), rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {loader.accumulation for loader in ranks} == {accumulation}
    assert {len(loader) for loader in ranks} == {len(one) // world_size}
    dealt = zip(*(loader.epoch(0) for loader in ranks), strict=True)
    assert identical(list(one.epoch(0)), [batch for turn in dealt for batch in turn])


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_can_begin_anywhere(cfg: DataConfig, workers: int) -> None:
    cfg = replace(cfg, num_workers=workers, global_batch_length=4 * cfg.max_batch_length)
    loader = build_dataloader(cfg, MaskingConfig(), rank=1, world_size=2)
    batches = list(loader.epoch(3))
    steps, rest = divmod(len(batches), 2)
    assert rest == 0
    for start in range(steps):
        assert identical(list(loader.epoch(3, start)), batches[2 * start :])
    assert list(loader.epoch(3, steps)) == []
    # Left in the middle, and restarted with the same workers.
    for _ in range(3):
        iterator = loader.epoch(3)
        next(iterator)
    assert identical(list(loader.epoch(3)), batches)
    loader.close()


def test_global_batch_length(cfg: DataConfig) -> None:
    whole = replace(cfg, global_batch_length=120_000)
    assert build_dataloader(cfg, None).accumulation == 1
    for world_size, accumulation in ((1, 6), (2, 3), (6, 1)):
        loader = build_dataloader(whole, None, world_size=world_size)
        assert loader.accumulation == accumulation
    for length, world_size, nearest in ((120_000, 4, "80000 or 160000"), (30_000, 2, "40000")):
        with pytest.raises(InputError, match=f"Nearest valid: {nearest}"):
            build_dataloader(replace(cfg, global_batch_length=length), None, world_size=world_size)


def test_recordings_shorter_than_a_frame_are_skipped(recordings: Callable[..., Path]) -> None:
    cfg = DataConfig(str(recordings([399, 400, 401])), min_sample_size=0, num_workers=0)
    assert sorted(row for batch in build_dataloader(cfg, None) for row in batch.rows.tolist()) == [1, 2]
    small = build_dataloader(cfg, None, conv_layer_config=[(8, 2, 2)])
    assert sorted(row for batch in small for row in batch.rows.tolist()) == [0, 1, 2]
    with pytest.raises(InputError, match="one frame of the model needs 400 samples"):
        build_dataloader(replace(cfg, max_sample_size=300), None)


def test_the_loader_does_not_affect_dropout(cfg: DataConfig) -> None:
    """Iterating draws nothing from torch's generator, or a resumed run would draw other dropout masks."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = build_dataloader(replace(cfg, num_workers=1), MaskingConfig())
    list(loader)
    loader.close()
    assert torch.equal(torch.get_rng_state(), before)


# Validation


@pytest.mark.parametrize("padding", [False, True])
def test_validation_is_the_same_for_any_number_of_processes(cfg: DataConfig, padding: bool) -> None:
    cfg = replace(cfg, enable_padding=padding)
    alone = list(build_validation_dataloader(cfg, MaskingConfig()))
    rows = [row for batch in alone for row in batch.rows.tolist()]
    assert rows == [row for row, length in enumerate(LENGTHS) if length >= 1200]  # by length, each once
    assert identical(alone, list(build_validation_dataloader(cfg, MaskingConfig()).epoch(7)))
    for world_size in (2, 3, len(alone) + 1):
        for rank in range(world_size):
            loader = build_validation_dataloader(cfg, MaskingConfig(), rank=rank, world_size=world_size)
            part = list(loader)
            assert len(loader) == len(part)
            assert identical([*part, alone[0]], [*alone[rank::world_size], alone[0]])


def test_validation_draws_follow_the_recording(cfg: DataConfig) -> None:
    """With padding, a recording's crop does not depend on its batch."""
    cfg = replace(cfg, enable_padding=True)
    starts = {}
    for size in (10_000, 20_000):
        loader = build_validation_dataloader(replace(cfg, max_batch_length=size), MaskingConfig())
        starts[size] = {
            row: start for b in loader for row, start in zip(b.rows.tolist(), b.starts.tolist(), strict=True)
        }
    assert starts[10_000] == starts[20_000]
    assert any(starts[10_000].values())


@pytest.mark.parametrize("padding", [False, True])
def test_a_validation_channel_mask_does_not_depend_on_the_batch(cfg: DataConfig, padding: bool) -> None:
    masking = MaskingConfig(mask_channel_prob=0.3, mask_channel_length=8)
    masks: list[dict[int, bytes]] = []
    for size in (8_000, 20_000, 40_000):
        sized = replace(cfg, enable_padding=padding, max_batch_length=size)
        masks.append({})
        for batch in build_validation_dataloader(sized, masking, channels=64):
            assert batch.channel_mask is not None
            rows = batch.rows.tolist()
            masks[-1] |= {row: mask.numpy().tobytes() for row, mask in zip(rows, batch.channel_mask, strict=True)}
    assert masks[0] == masks[1] == masks[2]
    assert len(set(masks[0].values())) > len(masks[0]) // 2


# What can go wrong


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_arrive_with_their_message(cfg: DataConfig, workers: int) -> None:
    (Path(cfg.manifest).parent / "audio" / "00020.wav").unlink()
    loader = build_dataloader(replace(cfg, num_workers=workers), MaskingConfig())
    with pytest.raises(InputError) as error:
        list(loader)
    assert str(error.value).endswith("audio/00020.wav: the file does not exist. Was it moved since it was listed?")
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_skipped_files_are_logged_once_and_counted(
    cfg: DataConfig, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    file = Path(cfg.manifest).parent / "audio" / "00020.wav"
    file.unlink()
    loader = build_dataloader(replace(cfg, num_workers=workers, on_error="skip"), MaskingConfig())
    with caplog.at_level(logging.WARNING, logger="spidr.data.loader"):
        for epoch in range(3):
            list(loader.epoch(epoch))
    loader.close()
    assert loader.skipped == {str(file): 3}
    assert [record.getMessage() for record in caplog.records] == [
        f"Skipped: {file}: the file does not exist. Was it moved since it was listed?"
    ]


def test_fewer_batches_than_processes(cfg: DataConfig) -> None:
    loader = build_dataloader(cfg, MaskingConfig(), world_size=50)
    with pytest.raises(InputError, match="batches for 50 processes"):
        len(loader)


def test_close_ends_the_workers(cfg: DataConfig, own_children: Callable[[], set[int]]) -> None:
    loader = build_dataloader(replace(cfg, num_workers=2), MaskingConfig())
    iterator = iter(loader)
    next(iterator)
    assert len(own_children()) == 2
    loader.close()
    assert not own_children()
    assert list(iterator) == []
    assert len(list(loader)) == len(loader)
    del loader, iterator
    assert not own_children()


def test_many_epochs_leave_nothing_behind(cfg: DataConfig, own_children: Callable[[], set[int]]) -> None:
    loader = build_dataloader(replace(cfg, num_workers=1), MaskingConfig())
    for epoch in range(3):
        list(loader.epoch(epoch))
    descriptors, processes = len(list(Path("/proc/self/fd").iterdir())), own_children()
    for epoch in range(20):
        list(loader.epoch(epoch))
    assert own_children() == processes
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 2
    loader.close()


def test_workers_outlive_signals_meant_for_the_main_process(
    cfg: DataConfig, own_children: Callable[[], set[int]]
) -> None:
    loader = build_dataloader(replace(cfg, num_workers=2), MaskingConfig())
    expected = list(loader)
    iterator = iter(loader)
    batches = [next(iterator)]
    for pid in own_children():
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            os.kill(pid, number)
    assert identical([*batches, *iterator], expected)
    loader.close()


def test_a_failing_program_ends(cfg: DataConfig, tmp_path: Path) -> None:
    """Workers do not keep a program alive if it ends without closing its loader."""
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent(f"""
        import multiprocessing
        from spidr.config import DataConfig, MaskingConfig
        from spidr.data import build_dataloader, loader

        loader.WORKER_GRACE = 1000
        if __name__ == "__main__":
            multiprocessing.set_start_method("fork")
            cfg = DataConfig({cfg.manifest!r}, num_workers=2, max_batch_length=20_000, max_sample_size=5000)
            iterator = iter(build_dataloader(cfg, MaskingConfig()))
            next(iterator)
            raise SystemExit(7)
        """)
    )
    quiet = ["-W", "ignore:This DataLoader will create"]  # more workers than cores
    command = [sys.executable, *quiet, str(script)]
    done = subprocess.run(command, timeout=250, check=False, capture_output=True, text=True)
    assert done.returncode == 7
    assert done.stderr == ""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_with_a_killed_program(cfg: DataConfig, tmp_path: Path, method: str) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent(f"""
        import multiprocessing, os, signal
        from spidr.config import DataConfig, MaskingConfig
        from spidr.data import build_dataloader

        if __name__ == "__main__":
            multiprocessing.set_start_method({method!r})
            cfg = DataConfig({cfg.manifest!r}, num_workers=2, max_batch_length=20_000, max_sample_size=5000)
            iterator = iter(build_dataloader(cfg, MaskingConfig()))
            next(iterator)
            print(*(process.pid for process in multiprocessing.active_children()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    done = subprocess.run([sys.executable, str(script)], timeout=250, check=False, stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    workers = done.stdout.split()
    assert len(workers) == 2
    assert wait_for(lambda: not any(map(is_running, workers)), 200), "workers live on"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_group_deals_the_batches(cfg: DataConfig, rank: int) -> None:
    whole = [batch.rows.tolist() for batch in build_dataloader(cfg, None)]
    torch.distributed.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
    try:
        loader = build_dataloader(cfg, None)
        mine = [batch.rows.tolist() for batch in loader]
    finally:
        torch.distributed.destroy_process_group()
    assert mine == (whole + whole[: len(whole) % 2])[rank::2]


def test_published_ways_to_set_epoch_and_seed(cfg: DataConfig) -> None:
    loader, ours = build_dataloader(cfg, MaskingConfig()), build_dataloader(cfg, MaskingConfig())
    loader.batch_sampler.set_epoch(3)
    third = list(loader)
    assert identical(third, list(ours.epoch(3)))
    assert len(loader.batch_sampler) == len(loader) == len(third)
    loader.generator.manual_seed(7)
    other = list(loader)
    assert [b.rows.tolist() for b in other] == [b.rows.tolist() for b in third]
    assert not torch.equal(other[0].mask, third[0].mask)
    loader.generator.manual_seed(7)
    assert identical(other, list(loader))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_one_bad_file_is_replaced(cfg: DataConfig, workers: int) -> None:
    """By another batch of the epoch, always the same one; and it is counted."""
    cfg = replace(cfg, on_error="skip", num_workers=workers, max_batch_length=5000)
    bad = Path(cfg.manifest).parent / "audio" / "00039.wav"
    bad.write_bytes(b"")
    made = []
    for _ in range(2):
        loader = build_dataloader(cfg, MaskingConfig())
        made.append(list(loader))
        assert loader.skipped == {str(bad): 1}
        loader.close()
    assert identical(*made)
    assert len(made[0]) == len(loader)
    assert 39 not in torch.cat([batch.rows for batch in made[0]])
    for file in bad.parent.iterdir():
        file.write_bytes(b"")
    with pytest.raises(InputError, match="No recording of a batch can be read"):
        list(build_dataloader(cfg, None))


def test_lists_without_lengths_are_measured(cfg: DataConfig) -> None:
    folder = Path(cfg.manifest).parent
    (folder / "wav.scp").write_text("".join(f"utt{i} audio/{i:05}.wav\n" for i in range(40)))
    listed = replace(cfg, manifest=str(folder / "wav.scp"))
    assert identical(list(build_dataloader(listed, MaskingConfig())), list(build_dataloader(cfg, MaskingConfig())))
    for name in ("00003.wav", "00007.wav"):
        (folder / "audio" / name).unlink()
    with pytest.raises(InputError, match=r"00003(.|\n)*00007(.|\n)*2 of 40 recordings cannot be read; `python -m"):
        build_dataloader(listed, None)


def test_spans_are_utterances(cfg: DataConfig) -> None:
    folder = Path(cfg.manifest).parent
    (folder / "wav.scp").write_text("".join(f"utt{i} audio/{i:05}.wav\n" for i in range(40)))
    (folder / "segments").write_text(
        "".join(f"s{i} utt{i} 0.0125 {(200 + 1200 + i) / 16_000}\n" for i in range(20, 40))
    )
    spans = replace(cfg, manifest=str(folder / "segments"), rand_crop=False, normalize=False)
    whole = speech_dataset(cfg.manifest, normalize=False)
    for batch in build_dataloader(spans, None):
        for row, waveform in zip(batch.rows.tolist(), batch.waveforms, strict=True):
            assert torch.equal(waveform, whole[row + 20][200 : 200 + len(waveform)])


def test_several_manifests_with_weights(recordings: Callable[..., Path], tmp_path: Path, cfg: DataConfig) -> None:
    rows = Path(cfg.manifest).read_text("utf-8").splitlines()
    parts = {"a.csv": rows[11:16], "b.csv": rows[16:]}  # 5 and 25 recordings
    for name, part in parts.items():
        (tmp_path / name).write_text("\n".join([rows[0], *part]))
    both = replace(cfg, manifest=[str(tmp_path / name) for name in parts])
    once = torch.cat([batch.rows for batch in build_dataloader(both, None)])
    assert sorted(once.tolist()) == list(range(30))
    loader = build_dataloader(replace(both, weights=[1, 1]), None)
    lengths = np.minimum(loader.dataset.manifest["num_samples"].to_numpy(), cfg.max_sample_size)
    shares = []
    for epoch in range(20):
        drawn = torch.cat([batch.rows for batch in loader.epoch(epoch)]).numpy()
        shares.append(lengths[drawn[drawn < 5]].sum() / lengths[drawn].sum())
        assert 0.7 < lengths[drawn].sum() / lengths.sum() < 1.3
        if epoch == 0:
            assert np.bincount(drawn, minlength=30)[:5].min() >= 2  # the few recordings occur several times
    assert abs(np.mean(shares) - 0.5) < 0.03
    with pytest.raises(InputError, match="must be as many as there are manifests"):
        replace(both, weights=[1.0])


@pytest.mark.parametrize("reason", ["little shared memory", "a long name"])
def test_batches_travel_without_shared_memory(
    cfg: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    caplog.set_level(logging.INFO)
    alone = list(build_dataloader(cfg, MaskingConfig()))
    if reason == "a long name":
        (tmp_path / ("x" * 120)).mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 120)))
    else:
        cfg = replace(cfg, max_batch_length=2**31 - 1, prefetch_factor=1000, num_buckets=1)
        alone = list(build_dataloader(cfg, MaskingConfig()))
    loader = build_dataloader(replace(cfg, num_workers=1), MaskingConfig())
    assert identical(list(loader), alone)
    assert "do without shared memory" in caplog.text
    loader.close()
    data = ForkingPickler.dumps(PackedBatch(alone[0]))
    assert len(data) > alone[0].waveforms.nbytes
    assert identical([pickle.loads(data).open()], alone[:1])


@pytest.mark.parametrize("which", [0, 1])
def test_a_worker_killed_between_two_epochs_is_noticed(
    cfg: DataConfig, own_children: Callable[[], set[int]], which: int
) -> None:
    loader = build_dataloader(replace(cfg, num_workers=2), None)
    for _ in loader.epoch(0):
        pass
    os.kill(sorted(own_children())[which], signal.SIGKILL)
    with pytest.raises(InputError, match="A data worker died"):
        list(loader.epoch(1))
    loader.close()


def test_a_killed_worker_ends_the_epoch(cfg: DataConfig, own_children: Callable[[], set[int]]) -> None:
    loader = build_dataloader(replace(cfg, num_workers=2, prefetch_factor=1), None)

    def use() -> None:
        for epoch in range(1000):
            for _ in loader.epoch(epoch):
                for pid in sorted(own_children())[:1]:  # none, if a batch was ready before its worker died
                    os.kill(pid, signal.SIGKILL)

    with pytest.raises(InputError, match="A data worker died"):
        use()
    loader.close()


def test_workers_killed_while_they_send_to_a_thread(
    cfg: DataConfig, own_children: Callable[[], set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread gets no signal, and would wait forever for the rest of a batch."""
    monkeypatch.setattr("spidr.data.loader._has_shared_memory", lambda *_: False)  # so they send more than a pipe holds
    loader = build_dataloader(replace(cfg, num_workers=2), None)

    def use() -> None:
        batches = loader.epoch(0)
        next(batches)
        time.sleep(0.5)
        for pid in own_children():
            os.kill(pid, signal.SIGKILL)
        list(batches)

    with ThreadPoolExecutor(1) as pool, pytest.raises(InputError, match="A data worker died"):
        pool.submit(use).result(100)
    loader.close()

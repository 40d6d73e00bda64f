"""Batches: what is read, cropped, padded, standardised and masked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from helpers.synthetic import noise, write_audio
from spidr.config import DEFAULT_CONV_LAYER_CONFIG, DataConfig, MaskingConfig
from spidr.data import Batch, audio, batch as batch_module, speech_dataset
from spidr.data.batch import BatchRequest, Collator
from spidr.tools.errors import InputError
from spidr.tools.frames import conv_length

CFG = DataConfig("m.csv", min_sample_size=400, max_sample_size=20_000, max_batch_length=10**6)


def collate(
    manifest: Path, cfg: DataConfig = CFG, *, by_row: bool = False, rows: list[int] | None = None, **kwargs: int
) -> Batch:
    dataset = speech_dataset(manifest, normalize=cfg.normalize)
    chosen = np.arange(len(dataset)) if rows is None else np.array(rows)
    lengths = dataset.manifest["num_samples"].to_numpy()[chosen]
    request = BatchRequest(
        chosen, lengths, dataset.recordings(chosen), 0, None if by_row else (0, kwargs.pop("number", 0))
    )
    masking = MaskingConfig(mask_channel_prob=0.2) if "channels" in kwargs else MaskingConfig()
    return Collator(cfg, masking, DEFAULT_CONV_LAYER_CONFIG, kwargs.get("channels"))(request)


def whole(manifest: Path, *, normalize: bool = True) -> list[torch.Tensor]:
    return list(speech_dataset(manifest, normalize=normalize))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rand_crop", [True, False])
@pytest.mark.parametrize("suffix", [".wav", ".flac"])
@pytest.mark.parametrize("stats", [True, False])
def test_cropped_to_the_shortest(
    recordings: Callable[..., Path], normalize: bool, rand_crop: bool, suffix: str, stats: bool
) -> None:
    """Each waveform is a part of the recording standardised as a whole, even if only that part is read."""
    manifest = recordings([5000, 9000, 70_000, 20_001], suffix, stats=stats)
    batch = collate(manifest, replace(CFG, normalize=normalize, rand_crop=rand_crop))
    assert batch.waveforms.shape == (4, 5000)
    assert batch.waveforms.dtype == torch.float32
    assert batch.lengths is batch.frame_lengths is batch.attention_mask is None
    assert batch.num_samples == 20_000
    frames = conv_length(DEFAULT_CONV_LAYER_CONFIG, 5000)
    assert (batch.max_frames, batch.num_frames) == (frames, 4 * frames)
    for waveform, start, recording in zip(
        batch.waveforms, batch.starts, whole(manifest, normalize=normalize), strict=True
    ):
        torch.testing.assert_close(waveform, recording[start : start + 5000], rtol=0, atol=0)
    assert bool(batch.starts.any()) == rand_crop
    assert batch.starts[0] == 0


def test_padded(recordings: Callable[..., Path]) -> None:
    manifest = recordings([5000, 30_000, 400])
    batch = collate(manifest, replace(CFG, enable_padding=True))
    assert batch.waveforms.shape == (3, 20_000)
    assert batch.lengths is not None
    assert batch.frame_lengths is not None
    assert batch.lengths.tolist() == [5000, 20_000, 400]
    assert batch.frame_lengths.tolist() == [15, 62, 1]
    assert (batch.num_samples, batch.num_frames, batch.max_frames) == (25_400, 78, 62)
    for waveform, length, start, recording in zip(
        batch.waveforms, batch.lengths, batch.starts, whole(manifest), strict=True
    ):
        assert torch.equal(waveform[:length], recording[start : start + length])
        assert not waveform[length:].any()
    assert batch.attention_mask is not None
    assert batch.attention_mask.shape == (3, 1, 1, 62)
    assert batch.attention_mask.sum((1, 2, 3)).tolist() == [15, 62, 1]
    assert batch.attention_mask[0, 0, 0, :15].all()
    assert batch.mask is not None
    assert not (batch.mask & ~batch.attention_mask[:, 0, 0]).any()
    # Without padding, there are no lengths and no attention mask.
    same = collate(manifest, replace(CFG, enable_padding=True), rows=[1, 1])
    assert same.lengths is same.attention_mask is None


def test_masks(recordings: Callable[..., Path]) -> None:
    batch = collate(recordings([16_000, 18_000]), channels=32)
    assert batch.mask is not None
    assert batch.mask_indices is not None
    assert batch.mask.shape == (2, 49)
    assert torch.equal(batch.mask.nonzero()[:, 1].view(2, -1), batch.mask_indices)
    assert batch.channel_mask is not None
    assert batch.channel_mask.shape == (2, 32)
    waveforms, attention_mask, mask = batch
    assert waveforms is batch.waveforms
    assert attention_mask is None
    assert mask is batch.mask


def test_channel_masks_need_the_number_of_channels() -> None:
    with pytest.raises(InputError, match="channels="):
        Collator(CFG, MaskingConfig(mask_channel_prob=0.1), DEFAULT_CONV_LAYER_CONFIG, None)


def test_without_masking(recordings: Callable[..., Path]) -> None:
    dataset = speech_dataset(recordings([1000]), normalize=True)
    request = BatchRequest(np.array([0]), np.array([1000]), dataset.recordings(np.array([0])), 0, (0, 0))
    batch = Collator(CFG, None, DEFAULT_CONV_LAYER_CONFIG, None)(request)
    assert batch.mask is batch.mask_indices is batch.channel_mask is None


def test_draws_depend_on_the_batch_number(recordings: Callable[..., Path]) -> None:
    manifest = recordings([16_000, 40_000])
    first, again, other = collate(manifest), collate(manifest), collate(manifest, number=1)
    assert torch.equal(first.waveforms, again.waveforms)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.waveforms, other.waveforms)
    assert not torch.equal(first.mask, other.mask)


def test_draws_by_row_depend_on_the_row(recordings: Callable[..., Path]) -> None:
    manifest = recordings([16_000, 40_000, 16_000])
    first = collate(manifest, by_row=True)
    turned = collate(manifest, by_row=True, rows=[2, 1, 0])
    assert torch.equal(first.waveforms, turned.waveforms.flip(0))
    assert torch.equal(first.mask, turned.mask.flip(0))
    assert not torch.equal(first.mask[0], first.mask[2])


def test_crops_reach_both_ends(recordings: Callable[..., Path]) -> None:
    manifest = recordings([402, 400])
    starts = [collate(manifest, number=i).starts[0].item() for i in range(60)]
    assert set(starts) == {0, 1, 2}
    assert min(starts.count(i) for i in range(3)) > 8


def test_long_recordings_are_decoded_whole_at_most_once(
    recordings: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = recordings([300_000], ".flac")
    decoded: list[int] = []
    read = soundfile.SoundFile.read

    def counted(self: soundfile.SoundFile, frames: int, **options: object) -> np.ndarray:
        decoded.append(frames)
        return read(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    batch_module._remembered_statistics.cache_clear()
    collate(manifest)
    assert 320_000 <= sum(decoded) <= 320_001 + audio.BLOCK
    assert max(decoded) <= audio.BLOCK
    decoded.clear()
    collate(manifest, number=1)
    assert decoded == [1, 20_000]  # does the last sample exist?
    decoded.clear()
    collate(recordings([300_000], ".flac", stats=True))
    assert decoded[-1] == 20_000


def test_moved_between_devices(recordings: Callable[..., Path]) -> None:
    batch = collate(recordings([5000, 9000]), replace(CFG, enable_padding=True), channels=8)
    moved = batch.to("meta", non_blocking=True)
    for name in ("waveforms", "rows", "starts", "lengths", "frame_lengths", "mask", "mask_indices", "channel_mask"):
        assert getattr(moved, name).device.type == "meta"
    assert moved.num_samples == batch.num_samples
    assert moved.attention_mask is not None
    assert moved.attention_mask.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_pinned_and_moved_to_a_gpu(recordings: Callable[..., Path]) -> None:
    batch = collate(recordings([5000, 9000]))
    pinned = batch.pin_memory()
    assert pinned.waveforms.is_pinned()
    moved = pinned.to("cuda", non_blocking=True)
    assert torch.equal(moved.waveforms.cpu(), batch.waveforms)


# Recordings that cannot be read


@pytest.fixture
def partly_bad(recordings: Callable[..., Path], tmp_path: Path) -> Path:
    """Rows 1 (missing), 3 (long, damaged far inside) and 4 (shorter than in the manifest) are bad."""
    manifest = recordings([16_000, 17_000, 18_000, 200_000, 19_000], ".flac")
    (tmp_path / "audio" / "00001.flac").unlink()
    long = tmp_path / "audio" / "00003.flac"
    data = bytearray(long.read_bytes())
    data[5000 : len(data) - 50] = bytes(len(data) - 5050)
    long.write_bytes(data)
    write_audio(tmp_path / "audio" / "00004.flac", noise(300))
    return manifest


def test_raise(partly_bad: Path) -> None:
    for row, message in (
        (1, "00001.flac: the file does not exist"),
        (3, "00003.flac: damaged"),
        (4, "300 samples, fewer"),
    ):
        with pytest.raises(InputError, match=message):
            collate(partly_bad, rows=[0, row])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("padding", [True, False])
def test_skip(partly_bad: Path, normalize: bool, padding: bool) -> None:
    cfg = replace(CFG, on_error="skip", normalize=normalize, enable_padding=padding)
    batch = collate(partly_bad, cfg)
    assert sorted(Path(file).name for file in batch.skipped) == ["00001.flac", "00003.flac", "00004.flac"]
    assert all(reason.startswith(file) for file, reason in batch.skipped.items())
    assert batch.rows.tolist() == [0, 2, 2, 2, 0]
    assert len(batch.waveforms) == 5
    assert batch.waveforms.isfinite().all()
    assert torch.equal(batch.waveforms[0], batch.waveforms[4])
    assert torch.equal(batch.waveforms, collate(partly_bad, cfg).waveforms)
    lengths = [16_000] * 5 if not padding else [16_000, 18_000, 18_000, 18_000, 16_000]
    assert batch.num_samples == sum(lengths)


def test_no_replacement_is_left(partly_bad: Path) -> None:
    with pytest.raises(InputError, match=r"No recording of a batch can be read. .*00001.flac"):
        collate(partly_bad, replace(CFG, on_error="skip"), rows=[1, 4])


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("multiple", [8, 16])
def test_frames_are_a_multiple(recordings: Callable[..., Path], padding: bool, multiple: int) -> None:
    cfg = replace(CFG, enable_padding=padding, length_multiple=multiple, normalize=False, rand_crop=False)
    manifest = recordings([9000, 12_345, 15_000])
    batch, plain = (collate(manifest, c) for c in (cfg, replace(cfg, length_multiple=1)))
    assert batch.max_frames == conv_length(DEFAULT_CONV_LAYER_CONFIG, batch.waveforms.shape[1])
    assert batch.max_frames % multiple == 0 == batch.mask.shape[1] % multiple
    assert abs(batch.max_frames - plain.max_frames) < multiple
    if padding:
        assert batch.lengths.tolist() == plain.lengths.tolist()
        assert torch.equal(batch.waveforms[:, :15_000], plain.waveforms)
        assert not batch.waveforms[:, 15_000:].any()
        assert not (batch.mask & ~batch.attention_mask[:, 0, 0]).any()
    else:
        assert batch.lengths is None
        assert torch.equal(batch.waveforms, plain.waveforms[:, : batch.waveforms.shape[1]])


@pytest.mark.parametrize("padding", [True, False])
def test_wrong_lengths_do_not_make_a_batch_too_long(
    recordings: Callable[..., Path], caplog: pytest.LogCaptureFixture, padding: bool
) -> None:
    manifest = recordings([15_000] * 4)
    manifest.write_text(manifest.read_text().replace(",15000", ",2000"))
    batch_module._warn_of_wrong_lengths.cache_clear()
    batch = collate(manifest, replace(CFG, enable_padding=padding, max_batch_length=20_000))
    assert batch.waveforms.shape == (4, 2000)
    assert "recordings are longer than it says" in caplog.text
    assert collate(manifest, replace(CFG, enable_padding=padding)).waveforms.shape == (4, 15_000)

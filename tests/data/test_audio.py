"""Samples and lengths, bit for bit, and recordings that must be refused."""

from __future__ import annotations

import io
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import noise, write_archive, write_audio

from spidr.data import num_samples
from spidr.data.audio import (
    Recording,
    _plain_flac,
    _plain_wav,
    _read_plain,
    read_audio,
    standardize,
    statistics,
    statistics_of,
)
from spidr.tools.errors import InputError

FORMATS = [(".wav", "PCM_16"), (".wav", "PCM_24"), (".wav", "FLOAT"), (".wav", "ULAW"), (".flac", "PCM_16")]


@pytest.mark.parametrize(("suffix", "subtype"), FORMATS)
def test_samples_and_ranges_are_libsndfiles(tmp_path: Path, suffix: str, subtype: str) -> None:
    file = write_audio(tmp_path / f"a{suffix}", noise(40_001), subtype=subtype)
    (member,) = write_archive(tmp_path / "t.tar", {f"a{suffix}": file.read_bytes()})
    expected, _ = soundfile.read(file, dtype="float32")
    for source in (file, str(file), file.read_bytes(), Recording(str(file)), member):
        assert num_samples(source) == num_samples(source, verify=True) == 40_001
        samples = read_audio(source)
        assert samples.dtype == np.float32
        np.testing.assert_array_equal(samples, expected)
        for start, stop in ((0, 1), (20_000, 36_000), (40_000, 40_001)):
            np.testing.assert_array_equal(read_audio(source, start, stop), expected[start:stop])


@pytest.mark.parametrize(("suffix", "subtype"), FORMATS)
def test_names_that_are_no_utf8(tmp_path: Path, suffix: str, subtype: str) -> None:
    path = os.fsencode(write_audio(tmp_path / f"a{suffix}", noise(500), subtype=subtype))
    name = os.fsdecode(path.replace(b"/a.", b"/\xff."))
    Path(os.fsdecode(path)).rename(name)
    for source in (name, Path(name), Recording(name)):
        assert num_samples(source) == len(read_audio(source)) == 500


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_errors_of_the_disk_name_the_recording(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.symlink_to("/proc/self/mem")  # a regular file that cannot be read
    for read in (num_samples, read_audio, statistics):
        with pytest.raises(InputError, match=f"a{suffix}: "):
            read(path)


@pytest.mark.parametrize(("suffix", "subtype"), FORMATS)
def test_more_than_there_is(tmp_path: Path, suffix: str, subtype: str) -> None:
    path = write_audio(tmp_path / f"a{suffix}", noise(1000), subtype=subtype)
    with pytest.raises(InputError, match="has 1000 samples; asked for were those up to 2000"):
        read_audio(path, 0, 2000)


def test_int16_values_are_exact(tmp_path: Path) -> None:
    values = np.arange(-32768, 32768).astype(np.int16)
    file = write_audio(tmp_path / "a.wav", values)
    np.testing.assert_array_equal(read_audio(file), values.astype(np.float64) / 32768)


@pytest.mark.parametrize("samples", [1, 100, 65_536, 200_000])
def test_statistics(tmp_path: Path, samples: int) -> None:
    file = write_audio(tmp_path / "a.flac", noise(samples))
    whole = read_audio(file)
    assert statistics(file) == statistics_of(whole)
    mean, std = statistics_of(whole)
    assert mean == pytest.approx(whole.astype(np.float64).mean(), abs=1e-8)
    assert std == pytest.approx(whole.astype(np.float64).std(), rel=1e-6, abs=1e-9)
    expected = torch.nn.functional.layer_norm(torch.from_numpy(whole), (samples,), eps=1e-5)
    standardize(whole, mean, std, out=whole)
    np.testing.assert_allclose(whole, expected.numpy(), atol=2e-6)


@given(position=st.integers(0, 41), value=st.integers(0, 255), samples=st.sampled_from([1, 100, 5000, 2**36 - 1]))
@settings(deadline=None, max_examples=300)
def test_flac_headers_mean_what_libsndfile_says(position: int, value: int, samples: int) -> None:
    """With damage in its stream information, the short cut gives libsndfile's length or leaves the file to it."""
    file = io.BytesIO()
    soundfile.write(file, noise(5000), 16_000, format="FLAC", subtype="PCM_16")
    flac = bytearray(file.getvalue())
    assert _plain_flac(io.BytesIO(flac)) == 5000
    flac[18:26] = (int.from_bytes(flac[18:26], "big") >> 36 << 36 | samples).to_bytes(8, "big")
    assert _plain_flac(io.BytesIO(flac)) == samples
    flac[position] = value
    if found := _plain_flac(io.BytesIO(flac)):
        with soundfile.SoundFile(io.BytesIO(flac)) as damaged:
            assert (damaged.frames, damaged.samplerate, damaged.channels) == (found, 16_000, 1)


def corrupt(tmp_path: Path) -> dict[str, Path]:
    """One file for each reason to refuse a recording."""
    good = noise(40_000)
    flac = write_audio(tmp_path / "good.flac", good).read_bytes()
    wav = write_audio(tmp_path / "good.wav", good).read_bytes()
    not_finite = good / np.float32(32768)
    not_finite[777] = np.nan
    endless = bytearray(flac)
    endless[21] &= 0xF0
    endless[22:26] = bytes(4)
    raw = {
        "truncated.flac": flac[: len(flac) // 2],
        "last byte missing.flac": flac[:-1],
        "no frame.flac": flac[:60],
        "damaged.flac": flac[: len(flac) // 2] + bytes(64) + flac[len(flac) // 2 + 64 :],
        "endless.flac": bytes(endless),
        "no size.wav": b"",
        "no samples.wav": wav[:44],
        "half a header.wav": wav[:20],
        "text.wav": b"This is not a recording.\n" * 10,
    }
    for name, data in raw.items():
        (tmp_path / name).write_bytes(data)
    write_audio(tmp_path / "not finite.wav", not_finite, subtype="FLOAT")
    write_audio(tmp_path / "infinite.wav", np.nan_to_num(not_finite, nan=-np.inf), subtype="FLOAT")
    write_audio(tmp_path / "stereo.wav", np.stack([good, good], axis=1))
    write_audio(tmp_path / "8 kHz.flac", good, 8000)
    (tmp_path / "folder.wav").mkdir()
    return {path.name: path for path in tmp_path.iterdir() if not path.name.startswith("good")}


def test_bad_recordings_are_refused_by_name(tmp_path: Path) -> None:
    reasons = {
        "truncated.flac": "truncated",
        "last byte missing.flac": "truncated",
        "no frame.flac": "not a readable",
        "damaged.flac": "damaged",
        "endless.flac": "does not say how long",
        "no size.wav": "the file is empty",
        "no samples.wav": "has no samples",
        "half a header.wav": "not a readable",
        "text.wav": "not a readable",
        "not finite.wav": "not finite",
        "infinite.wav": "not finite",
        "stereo.wav": "2 channels",
        "8 kHz.flac": "8000 Hz",
        "folder.wav": "not a regular file",
        "vanished.wav": "does not exist",
        "vanished.mp3": "does not exist",
    }
    files = corrupt(tmp_path) | {name: tmp_path / name for name in ("vanished.wav", "vanished.mp3")}
    assert files.keys() == reasons.keys()
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=reason) as error:
            num_samples(files[name], verify=True)
        assert str(error.value).startswith(str(files[name]))
        with pytest.raises(InputError):
            read_audio(files[name], 0, 40_000)


def test_long_statistics_refuse_too(tmp_path: Path) -> None:
    files = corrupt(tmp_path)
    for name in ("truncated.flac", "damaged.flac", "not finite.wav"):
        with pytest.raises(InputError, match=name):
            statistics(files[name])


# Formats of TorchCodec


def pretend_torchcodec(monkeypatch: pytest.MonkeyPatch, decoder: Callable[..., object] | None) -> None:
    module: ModuleType | None = None
    if decoder is not None:
        module = ModuleType("torchcodec.decoders")
        module.AudioDecoder = decoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)


def test_without_torchcodec_or_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_audio(tmp_path / "a.mp3", noise(16_000))

    def without_ffmpeg(*_: object, **__: object) -> object:
        raise RuntimeError("Could not load libtorchcodec. Likely causes:\n …")

    for decoder in (None, without_ffmpeg):
        pretend_torchcodec(monkeypatch, decoder)
        with pytest.raises(InputError, match=r"need TorchCodec and FFmpeg: `pip install 'spidr\[extract\]'`") as error:
            num_samples(file)
        assert str(error.value).startswith(str(file))
        assert "\n" not in str(error.value)


def test_what_torchcodec_gives_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_audio(tmp_path / "a.mp3", noise(16_000))
    asked: list[int | None] = []

    def decoder(codec: str, sample_rate: int, channels: int, samples: int) -> Callable[..., object]:
        def decode(_: str, sample_rate_asked: int | None = None, **options: int) -> object:
            asked.append(options.get("sample_rate", sample_rate_asked))
            data = torch.ones(channels, samples)
            return SimpleNamespace(
                metadata=SimpleNamespace(codec=codec, sample_rate=sample_rate, num_channels=channels),
                get_all_samples=lambda: SimpleNamespace(data=data),
            )

        return decode

    pretend_torchcodec(monkeypatch, decoder("mp3", 16_000, 1, 50))
    assert num_samples(file) == 50
    assert read_audio(file, 10, 30).tolist() == [1.0] * 20
    for arguments, message in [
        (("mp3", 8000, 1, 50), "8000 Hz"),
        (("mp3", 16_000, 2, 50), "2 channels"),
        (("opus", 48_000, 2, 50), "2 channels"),
        (("mp3", 16_000, 1, 0), "no samples"),
    ]:
        pretend_torchcodec(monkeypatch, decoder(*arguments))
        with pytest.raises(InputError, match=message):
            num_samples(file)
    pretend_torchcodec(monkeypatch, decoder("opus", 48_000, 1, 50))
    asked.clear()
    assert num_samples(file) == 50
    assert asked == [None, 16_000]


def has_ffmpeg() -> bool:
    try:
        from torchcodec.decoders import AudioDecoder

        AudioDecoder(b"")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return "libtorchcodec" not in str(error) and not isinstance(error, (ImportError, OSError))
    return True


@pytest.mark.skipif(not has_ffmpeg(), reason="FFmpeg is not installed")
@pytest.mark.parametrize("name", ["a.mp3", "a.flac"])
def test_torchcodec_decodes_in_one_thread(tmp_path: Path, name: str) -> None:
    """It has no setting for that, and FFmpeg's decoder of FLAC could use several."""
    from torchcodec.decoders import AudioDecoder

    file = write_audio(tmp_path / name, noise(160_000))
    before = len(list(Path("/proc/self/task").iterdir()))
    decoder = AudioDecoder(file)
    assert decoder.get_all_samples().data.shape == (1, 160_000)
    assert len(list(Path("/proc/self/task").iterdir())) == before  # a decoder's threads live as long as it does


@pytest.mark.skipif(not has_ffmpeg(), reason="FFmpeg is not installed")
def test_torchcodec_decodes_other_formats(tmp_path: Path) -> None:
    wave = (8000 * np.sin(np.arange(40_000) / 20)).astype(np.int16)
    for suffix, options in (
        (".mp3", {}),
        (".ogg", {"subtype": "VORBIS"}),
        (".opus", {"format": "OGG", "subtype": "OPUS"}),
    ):
        file = write_audio(tmp_path / f"a{suffix}", wave, **options)
        (member,) = write_archive(tmp_path / "t.tar", {f"a{suffix}": file.read_bytes()})
        samples = read_audio(file)
        np.testing.assert_array_equal(read_audio(member), samples)
        assert num_samples(file) == num_samples(member) == len(samples)
        assert abs(len(samples) - 40_000) < 2000
        assert np.corrcoef(samples[5000:35_000], wave[5000:35_000])[0, 1] > 0.95
    (tmp_path / "text.mp3").write_text("This is not a recording.")
    with pytest.raises(InputError, match=r"text.mp3: cannot be decoded"):
        num_samples(tmp_path / "text.mp3")


PLAIN = (1, 1, 16_000, 16)
WAV_CHUNKS = st.lists(
    st.tuples(st.sampled_from([b"LIST", b"bext", b"fact", b"JUNK"]), st.binary(max_size=40)), max_size=3
)


@given(
    before=WAV_CHUNKS,
    between=WAV_CHUNKS,
    layout=st.sampled_from(
        [(1, 1, 16_000, 16), (1, 1, 16_000, 24), (1, 2, 16_000, 16), (1, 1, 8000, 16), (3, 1, 16_000, 32)]
    ),
    samples=st.integers(0, 300),
    promised=st.sampled_from([0, -1, 7, 2**20]),
    cut=st.sampled_from([0, 0, 1, 50]),
)
@settings(deadline=None, max_examples=300)
def test_wav_headers_mean_what_libsndfile_says(
    before: list[tuple[bytes, bytes]],
    between: list[tuple[bytes, bytes]],
    layout: tuple[int, int, int, int],
    samples: int,
    promised: int,
    cut: int,
) -> None:
    """The short cut for plain WAV headers gives libsndfile's length or leaves the file to it."""
    kind, channels, rate, bits = layout
    align = channels * bits // 8

    def chunk(name: bytes, data: bytes, size: int | None = None) -> bytes:
        return name + struct.pack("<I", len(data) if size is None else size) + data + bytes(len(data) % 2)

    data = bytes(range(256)) * 8
    body = b"".join(chunk(*item) for item in before)
    body += chunk(b"fmt ", struct.pack("<HHIIHH", kind, channels, rate, rate * align, align, bits))
    body += b"".join(chunk(*item) for item in between)
    body += chunk(b"data", data[: samples * align], max(0, samples * align + promised))
    wav = chunk(b"RIFF", b"WAVE" + body)
    wav = wav[: len(wav) - cut]
    found = _plain_wav(io.BytesIO(wav))[1]
    if found:
        with soundfile.SoundFile(io.BytesIO(wav)) as file:
            assert (file.frames, file.samplerate, file.channels) == (found, 16_000, 1)
            np.testing.assert_array_equal(_read_plain(wav, 0, None), file.read(dtype="float32"))
            if found > 3:
                file.seek(2)
                np.testing.assert_array_equal(_read_plain(wav, 2, found - 1), file.read(found - 3, dtype="float32"))
        assert _read_plain(wav, 0, found + 1) is None
    elif (
        layout == PLAIN and samples and not promised and not cut and {name for name, _ in before + between} <= {b"LIST"}
    ):
        pytest.fail("a plain header was not understood")

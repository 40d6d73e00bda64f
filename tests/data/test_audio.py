"""Samples and lengths, bit for bit, and recordings to refuse."""

import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from helpers.synthetic import noise, write_archive, write_audio
from spidr.data import num_samples
from spidr.data.audio import (
    read_audio,
    read_resampled,
    resampled_length,
    standardize,
    statistics,
    statistics_of,
    stream,
)
from spidr.data.recording import Recording
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
def test_names_that_are_not_utf8(tmp_path: Path, suffix: str, subtype: str) -> None:
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
def test_reading_past_the_end(tmp_path: Path, suffix: str, subtype: str) -> None:
    path = write_audio(tmp_path / f"a{suffix}", noise(1000), subtype=subtype)
    with pytest.raises(InputError, match="has 1000 samples, fewer than the 2000 requested"):
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


def corrupt(tmp_path: Path) -> dict[str, Path]:
    """One file per reason to refuse a recording."""
    good = noise(40_000)
    flac = write_audio(tmp_path / "good.flac", good).read_bytes()
    wav = write_audio(tmp_path / "good.wav", good).read_bytes()
    not_finite = good / np.float32(32768)
    not_finite[777] = np.nan
    raw = {
        "no frame.flac": flac[:60],
        "damaged.flac": flac[: len(flac) // 2] + bytes(64) + flac[len(flac) // 2 + 64 :],
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
        "no frame.flac": "libsndfile (nor FFmpeg can|cannot) read it",
        "damaged.flac": "damaged",
        "no size.wav": "the file is empty",
        "no samples.wav": "has no samples",
        "half a header.wav": "libsndfile (nor FFmpeg can|cannot) read it",
        "text.wav": "libsndfile (nor FFmpeg can|cannot) read it",
        "not finite.wav": "not finite",
        "infinite.wav": "not finite",
        "stereo.wav": "2 channels",
        "8 kHz.flac": "8000 Hz",
        "folder.wav": "it is a folder, not a file",
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


def test_statistics_of_long_recordings_refuse_too(tmp_path: Path) -> None:
    files = corrupt(tmp_path)
    for name in ("damaged.flac", "not finite.wav"):
        with pytest.raises(InputError, match=name):
            statistics(files[name])


# Formats


def wave(samples: int = 40_000) -> np.ndarray:
    return (8000 * np.sin(np.arange(samples) / 20)).astype(np.int16)


EVERY_FORMAT: dict[str, dict[str, str]] = {
    **{f"a.{ending}": {} for ending in ("aiff", "au", "caf", "w64", "mp3", "ogg")},
    "a.sph": {"format": "NIST"},
    "a.rf64": {"format": "RF64"},
    "a.opus": {"format": "OGG", "subtype": "OPUS"},
    **{f"{kind}.wav": {"subtype": kind} for kind in ("PCM_U8", "PCM_32", "DOUBLE", "GSM610", "IMA_ADPCM")},
    "extensible.wav": {"format": "WAVEX"},
    "an mp3.wav": {"format": "MP3"},
    "a wav.flac": {"format": "WAV"},
}


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_every_format_of_libsndfile(tmp_path: Path, name: str) -> None:
    file = write_audio(tmp_path / name, wave(), **EVERY_FORMAT[name])
    (member,) = write_archive(tmp_path / "t.tar", {name: file.read_bytes()})
    samples = read_audio(file)
    assert 0 <= len(samples) - 40_000 <= (1024 if name in ("GSM610.wav", "IMA_ADPCM.wav") else 0)  # whole blocks
    assert num_samples(file) == num_samples(member) == len(samples)
    np.testing.assert_array_equal(read_audio(member), samples)
    np.testing.assert_array_equal(np.concatenate(list(stream(file, size=7000))), samples)
    np.testing.assert_array_equal(read_audio(file, 20_000, 30_000), samples[20_000:30_000])
    assert np.corrcoef(samples[5000:35_000], wave()[5000:35_000])[0, 1] > 0.95


def headers_that_lie(folder: Path) -> dict[str, tuple[int, bool]]:
    """File → its samples, and whether the header promises more."""
    wav, flac = (write_audio(folder / f"good{end}", noise(20_000)).read_bytes() for end in (".wav", ".flac"))
    mp3 = write_audio(folder / "good.mp3", wave(64_000)).read_bytes()

    def sizes(riff: int, data: int) -> bytes:
        return wav[:4] + struct.pack("<I", riff) + wav[8:40] + struct.pack("<I", data) + wav[44:]

    def total(samples: int) -> bytes:
        number = int.from_bytes(flac[18:26], "big") >> 36 << 36 | samples
        return flac[:18] + number.to_bytes(8, "big") + flac[26:]

    made = {
        "ffmpeg pipe.wav": (sizes(2**32 - 1, 2**32 - 1), 20_000, False),
        "sox pipe.wav": (sizes(0x7FFFF024, 0x7FFFF000), 20_000, False),
        "never closed.wav": (sizes(0, 0), 20_000, False),
        "half.wav": (wav[: 44 + 20_000], 10_000, True),
        "pipe.flac": (total(0), 20_000, False),
        "too much.flac": (total(60_000), 20_000, True),
        "far too much.flac": (total(2**36 - 1), 20_000, True),
        "half.mp3": (mp3[: len(mp3) // 2], 0, True),
        "half.aiff": (write_audio(folder / "good.aiff", noise(20_000)).read_bytes()[:-20_000], 10_000, True),
    }
    for name, (data, _, _) in made.items():
        (folder / name).write_bytes(data)
    return {name: (samples, more) for name, (_, samples, more) in made.items()}


def test_lengths_are_counted_if_the_header_lies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, (there, more) in headers_that_lie(tmp_path).items():
        caplog.clear()
        samples = read_audio(tmp_path / name)
        assert len(samples) == there or (name == "half.mp3" and 20_000 < len(samples) < 40_000)
        assert num_samples(tmp_path / name, verify=True) == len(samples)
        assert sum(map(len, stream(tmp_path / name, size=3000))) == len(samples)
        assert num_samples(tmp_path / name) == len(samples)
        warnings = [record.getMessage() for record in caplog.records]
        assert len(warnings) == more, (name, warnings)
        assert all(warning.startswith(str(tmp_path / name)) for warning in warnings)


def test_half_a_flac_is_read_and_a_damaged_one_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flac = write_audio(tmp_path / "a.flac", noise(100_000)).read_bytes()
    (tmp_path / "half.flac").write_bytes(flac[: len(flac) // 2])
    samples = read_audio(tmp_path / "half.flac")
    assert 40_000 < len(samples) < 55_000
    np.testing.assert_array_equal(samples, read_audio(tmp_path / "a.flac")[: len(samples)])
    assert "half.flac: shorter than its header says" in caplog.text
    with pytest.raises(InputError, match=r"half\.flac: has \d+ samples, fewer than the 90000 requested"):
        read_audio(tmp_path / "half.flac", 80_000, 90_000)


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_resampling_needs_no_ffmpeg(tmp_path: Path, rate: int, channels: int) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)
    file = write_audio(tmp_path / "a.wav", 0.4 * np.stack([tone, 0.5 * tone][:channels], axis=1), rate, subtype="FLOAT")
    samples = read_resampled(file)
    assert samples.dtype == np.float32
    assert abs(len(samples) - 32_000) <= 1 and abs(resampled_length(file) - len(samples)) <= 1  # noqa: PT018
    expected = (0.4 if channels == 1 else 0.3) * np.sin(2 * np.pi * 440 * np.arange(len(samples)) / 16_000)
    np.testing.assert_allclose(samples[1000:-1000], expected[1000:-1000], atol=1e-3)
    np.testing.assert_array_equal(np.concatenate(list(stream(file, resample=True))), samples)
    with pytest.raises(InputError, match=f"{rate} Hz" if rate != 16_000 else "2 channels"):
        read_audio(file)


# Formats of TorchCodec


def has_ffmpeg() -> bool:
    try:
        from torchcodec.decoders import AudioDecoder

        AudioDecoder(b"")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return "libtorchcodec" not in str(error) and not isinstance(error, (ImportError, OSError))
    return shutil.which("ffmpeg") is not None


@pytest.mark.skipif(not has_ffmpeg(), reason="FFmpeg is not installed")
@pytest.mark.parametrize("name", ["a.m4a", "a.webm", "a.mka"])
def test_torchcodec_decodes_the_rest(tmp_path: Path, name: str) -> None:
    wav = write_audio(tmp_path / "a.wav", wave(64_000))
    subprocess.run(["ffmpeg", "-v", "error", "-i", wav, tmp_path / name], check=True)
    file = tmp_path / name
    (member,) = write_archive(tmp_path / "t.tar", {name: file.read_bytes()})
    samples = read_audio(file)
    np.testing.assert_array_equal(read_audio(member), samples)
    np.testing.assert_array_equal(read_audio(file, 100, 300), samples[100:300])
    assert num_samples(file) == num_samples(member) == len(samples)
    assert abs(len(samples) - 64_000) < 3000
    assert abs(np.abs(samples[20_000:40_000]).max() - 8000 / 32_768) < 0.02


def test_without_torchcodec_or_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    write_audio(tmp_path / "a.mp3", wave())
    write_audio(tmp_path / "stereo.wav", np.stack([wave(), wave()], axis=1), 44_100)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(
        InputError, match=r"install TorchCodec \(`pip install 'spidr\[extract\]'`\) and FFmpeg"
    ) as error:
        num_samples(tmp_path / "a.m4a")
    assert str(error.value).startswith(str(tmp_path / "a.m4a"))
    assert "\n" not in str(error.value)
    assert len(read_audio(tmp_path / "a.mp3")) == 40_000
    assert len(read_resampled(tmp_path / "stereo.wav")) == 14_512


def test_pipes_are_refused(tmp_path: Path) -> None:
    for name in ("pipe.wav", "pipe.m4a"):
        os.mkfifo(tmp_path / name)
        for read in (num_samples, read_audio, read_resampled, statistics):
            with pytest.raises(InputError, match=f"{name}: cannot be read .it is a pipe"):
                read(tmp_path / name)


def test_memory_depends_on_the_samples_only(tmp_path: Path) -> None:
    """A header that claims many channels or years of audio allocates nothing."""
    file = write_audio(tmp_path / "a.wav", noise(100))
    data = bytearray(file.read_bytes())
    data[22:24], data[32:34] = struct.pack("<H", 1024), struct.pack("<H", 2048)
    file.write_bytes(data)
    tracemalloc.start()
    for read in (num_samples, read_resampled):
        with suppress(InputError):
            read(file)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()

"""Members of archives, opened once and read in place; spans of recordings."""

import gc
import io
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile

from helpers.synthetic import noise, write_archive, write_audio
from spidr.data import num_samples
from spidr.data.audio import read_audio, read_resampled, statistics, statistics_of
from spidr.data.decoders import READ_AT_ONCE
from spidr.data.recording import Member, Recording
from spidr.tools.errors import InputError


def test_a_member_is_a_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    _, recording, _ = write_archive(tmp_path / "t.tar", {"a": b"before", "b": data, "c": b"after"})
    member, expected = Member(recording), io.BytesIO(data)
    for offset, whence, size in ((0, 0, 100), (50, 1, 10_000), (-300, 2, 500), (0, 2, 5), (20_000, 0, 5), (3, 0, -1)):
        assert member.seek(offset, whence) == expected.seek(offset, whence)
        assert member.read(size) == expected.read(size)
        assert member.tell() == expected.tell()
    assert member.seekable()


def test_archives_are_opened_once(tmp_path: Path) -> None:
    data = write_audio(tmp_path / "a.wav", noise(3000)).read_bytes()
    members = write_archive(tmp_path / "t.tar", {f"{i}.wav": data for i in range(20)})
    for member in members:
        np.testing.assert_array_equal(read_audio(member), read_audio(data))
    opened = [os.path.realpath(descriptor) for descriptor in Path("/proc/self/fd").iterdir()]
    assert opened.count(os.path.realpath(tmp_path / "t.tar")) == 1


def test_a_replaced_archive_is_read_again(tmp_path: Path) -> None:
    data = [write_audio(tmp_path / "a.wav", noise(3000, seed)).read_bytes() for seed in (1, 2)]
    (member,) = write_archive(tmp_path / "t.tar", {"a.wav": data[0]})
    np.testing.assert_array_equal(read_audio(member), read_audio(data[0]))
    write_archive(tmp_path / "new.tar", {"a.wav": data[1]})
    (tmp_path / "new.tar").replace(tmp_path / "t.tar")
    np.testing.assert_array_equal(read_audio(member), read_audio(data[1]))


def test_bad_archives(tmp_path: Path) -> None:
    data = write_audio(tmp_path / "a.wav", noise(3000)).read_bytes()
    (member,) = write_archive(tmp_path / "t.tar", {"a.wav": data})
    with pytest.raises(InputError, match=r"t.tar:a.wav: .*format not recognised"):
        num_samples(member._replace(byte_offset=member.byte_offset + 100))
    with pytest.raises(InputError, match="past the end of the archive"):
        num_samples(member._replace(byte_size=10**9))
    with pytest.raises(InputError, match=r"gone\.tar: the file does not exist"):
        num_samples(member._replace(archive=str(tmp_path / "gone.tar")))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("padding", [0, READ_AT_ONCE])
@pytest.mark.parametrize(("kind", "at", "change"), [("AIFF", 31, b"\xff" * 8), ("RF64", 32, b"\0\0\0\x80")])
def test_headers_that_point_outside_the_archive(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, at: int, change: bytes, padding: int
) -> None:
    """Before its start or past any file's end: no error is lost in a function that libsndfile calls."""
    file = io.BytesIO()
    soundfile.write(file, noise(3000), 16_000, format=kind, subtype="PCM_16")
    data = bytearray(file.getvalue()) + bytes(padding)
    data[at : at + len(change)] = change
    (member,) = write_archive(tmp_path / "t.tar", {"a.wav": bytes(data)})
    with suppress(InputError):
        assert len(read_audio(member)) == num_samples(member)
    gc.collect()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_a_span_is_a_recording(tmp_path: Path, suffix: str) -> None:
    file = write_audio(tmp_path / f"a{suffix}", noise(48_000))
    whole = read_audio(file)
    span = Recording(str(file), start=0.5, end=1.25)
    assert num_samples(span) == num_samples(span, verify=True) == 12_000
    samples = read_audio(span)
    np.testing.assert_array_equal(samples, whole[8000:20_000])
    np.testing.assert_array_equal(read_audio(span, 100, 200), samples[100:200])
    np.testing.assert_array_equal(read_resampled(span), samples)
    assert statistics(span) == statistics_of(samples)
    assert num_samples(Recording(str(file), start=2)) == num_samples(Recording(str(file), end=1)) == 16_000
    assert num_samples(Recording(str(file), start=2.5, end=3.4)) == 8000  # labels may end slightly late
    for start, end in ((2.5, 3.6), (3, None), (3.1, 3.2)):
        with pytest.raises(InputError, match=rf"a{suffix} \[.*: not within the 3 s that the recording lasts"):
            num_samples(Recording(str(file), start=start, end=end))
    with pytest.raises(InputError, match="has 12000 samples, fewer than the 12001 requested"):
        read_audio(span, 0, 12_001)

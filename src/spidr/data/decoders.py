"""Decode audio files with libsndfile, or TorchCodec where it cannot, and resample with soxr."""

import io
import logging
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from importlib import import_module
from typing import IO, Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from spidr.config import SAMPLE_RATE
from spidr.data.recording import Member, Recording, Source, as_recording, check_exists
from spidr.tools.errors import InputError
from spidr.tools.lazy import needs_extra
from spidr.tools.untrusted import check_memory

Samples = NDArray[np.float32]

logger = logging.getLogger(__name__)

PIECE = 1 << 22  # values to read at once, since a header may promise more than the file, or the memory, holds
READ_AT_ONCE = 1 << 22  # archive members up to this many bytes are read whole, even if only a part is needed
UNKNOWN_LENGTH = 1 << 40  # two years of samples: libsndfile reports at least this if a header leaves the length open
PLACEHOLDER = 0x7FF00000  # sizes of at least this mean "unknown" in headers that FFmpeg and SoX write to pipes

_SIZES = re.compile(r"^ *(?:data|Data Size|SSND|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
"""libsndfile's log of a file that is shorter, or longer, than its header says."""


class Decoder:
    """A recording opened with libsndfile, after TorchCodec has decoded it if need be.

    ``frames`` are samples per channel according to the header, None if only decoding can tell. ``seekable`` says
    whether a part can be read without decoding everything before it.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording, self.name = recording, str(recording)
        self._opened = recording
        try:
            self._file = _open(recording)
        except soundfile.LibsndfileError as error:
            self._opened = _by_torchcodec(recording, error)
            self._file = _open(self._opened)
        self.sample_rate, self.channels = int(self._file.samplerate), int(self._file.channels)
        self._header, self._position = int(self._file.frames), 0
        # The header of an MP3 says nothing reliable.
        self.frames = self._header if self._header < UNKNOWN_LENGTH and self._file.format != "MP3" else None
        # After a seek in MP3, Vorbis and Opus, libsndfile decodes wrong samples.
        is_exact = bool(soundfile.SoundFile.seekable(self._file)) and self._file.format not in ("MP3", "OGG")
        self.seekable = is_exact and self._opened is recording
        for promised, there in re.findall(_SIZES, self._file.extra_info):
            if int(there) < int(promised) < PLACEHOLDER:
                _warn(self.name, f"truncated: its header promises {promised} bytes, it has {there}")
                break

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def length(self) -> int | None:
        """Samples per channel without decoding them; None if only decoding can tell.

        libsndfile trusts FLAC's header, so read the last sample; for other formats it checks the file.
        """
        if self._file.format == "FLAC" and self.frames is not None and self.frames > 0:
            self._read(self.frames - 1, self.frames)
        return self.frames

    def read(self, start: int = 0, stop: int | None = None) -> Samples:
        """Read samples ``start`` to ``stop``, float32 (stop - start, channels).

        Without ``stop``, read to the end; warn if that comes earlier than the header says.

        Raises:
            InputError: The file is damaged, or has no such samples.
        """
        samples = self._read(start, stop)
        if stop is not None and len(samples) < stop - start:
            there = self._position if self.frames is None else self.frames
            raise InputError(f"{self.name}: has {there} samples, fewer than the {stop} requested.")
        return samples

    def blocks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Samples]:
        """Yield samples ``start`` to ``stop`` in blocks of ``size``."""
        while stop is None or start < stop:
            block = self._read(start, start + size) if stop is None else self.read(start, min(start + size, stop))
            yield block
            if len(block) < size:
                break
            start += size

    def _read(self, start: int, stop: int | None) -> Samples:
        """Read samples ``start`` to ``stop``, or to the end if that comes first."""
        end = stop
        if self.frames is not None:
            end = self.frames if stop is None else min(self.frames, stop)
            if start >= end:
                return np.empty((0, self.channels), np.float32)
        begin = start if self.seekable or start == self._position else 0
        # libsndfile decodes int16 several times as fast as float; scaling here gives the same bits.
        dtype = "int16" if self._file.subtype == "PCM_16" else "float32"
        samples, broken = np.empty((0, self.channels), dtype), ""
        try:
            if begin != self._position and self.seekable:
                self._file.seek(begin)
            elif begin != self._position:
                self._file.close()
                self._file = _open(self._opened)
            samples = self._pieces(None if end is None else end - begin, dtype)
            self._position = begin + len(samples)
        except soundfile.LibsndfileError as error:
            broken = error.error_string or "libsndfile says no more"
        is_short = end is not None and begin + len(samples) < end
        if self.frames is not None and (broken or is_short):
            there = self._readable(self.frames)
            if there not in (0, self.frames):
                _warn(self.name, f"shorter than its header says: {there} of {self.frames} samples")
                self._file, self._position, self.frames = _open(self._opened), 0, there
                return self._read(start, stop)
        if broken:
            raise InputError(f"{self.name}: damaged or truncated near sample {start} ({broken}).")
        if self.frames is None and (end is None or is_short) and self._position < 0.98 * self._header < UNKNOWN_LENGTH:
            _warn(self.name, f"shorter than its header says: {self._position} of {self._header} samples")
        samples = samples[start - begin :]
        return np.multiply(samples, np.float32(2**-15), dtype=np.float32) if dtype == "int16" else samples

    def _pieces(self, count: int | None, dtype: str) -> NDArray[Any]:
        """Read up to ``count`` samples from the file's position (None: all)."""
        pieces: list[NDArray[Any]] = []
        length, most = 0, max(1, PIECE // self.channels)
        while not pieces or (len(pieces[-1]) > 0 and length != count):
            size = most if count is None else min(most, count - length)
            pieces.append(self._file.read(size, dtype=dtype, always_2d=True))
            length += len(pieces[-1])
            check_memory(8 * length * self.channels, self.name)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _readable(self, frames: int) -> int:
        """Count the samples before the damage; all of them if the last one is readable, as the damage is in between."""

        def is_missing(position: int) -> bool:
            with _open(self._opened) as file:
                try:
                    file.seek(position)
                    return len(file.read(1)) == 0
                except soundfile.LibsndfileError:
                    return True

        return bisect_left(range(frames), True, key=is_missing) if is_missing(frames - 1) else frames


@contextmanager
def decoder(source: Source) -> Iterator[Decoder]:
    """Open a recording with libsndfile or TorchCodec.

    Raises:
        InputError: It is missing, empty or damaged, or no installed library can read it.
    """
    recording = as_recording(source)
    try:
        with closing(Decoder(recording)) as opened:
            yield opened
    except OSError as error:
        raise InputError(f"{recording}: cannot be read ({error.strerror or error}).") from None


def resampled(blocks: Iterable[Samples], sample_rate: int) -> Iterator[Samples]:
    """Mix blocks of samples (N, channels) down to one channel and resample them to 16 kHz, float32 (M,) each."""
    stream = None
    if sample_rate != SAMPLE_RATE:
        with needs_extra("extract"):
            import soxr
        stream = soxr.ResampleStream(sample_rate, SAMPLE_RATE, 1, dtype="float32")
    for block in blocks:
        mono = block[:, 0] if block.shape[1] == 1 else block.mean(1, dtype=np.float32)
        yield mono if stream is None else stream.resample_chunk(np.ascontiguousarray(mono))
    if stream is not None:
        yield stream.resample_chunk(np.empty(0, np.float32), last=True)


def _by_torchcodec(recording: Recording, error: soundfile.LibsndfileError) -> Recording:
    """Decode a whole file that libsndfile cannot read into one that it can."""
    with _raw(recording) as file:
        data = file.read()
    if not data:
        raise InputError(f"{recording}: the file is empty.")
    reason = "format not recognised" if error.code in (1, 7) else error.error_string.rstrip(".").lower()
    try:
        decoder_class = import_module("torchcodec.decoders").AudioDecoder
        opened = decoder_class(data)
        if opened.metadata.codec == "opus":  # FFmpeg would decode Opus to 48 kHz.
            opened = decoder_class(data, sample_rate=SAMPLE_RATE)
        samples = opened.get_all_samples()
    except (ImportError, OSError, RuntimeError, ValueError) as failure:
        if isinstance(failure, (ImportError, OSError)) or "libtorchcodec" in str(failure):
            raise InputError(
                f"{recording}: libsndfile cannot read it ({reason}); if it is M4A, WebM or the like, install "
                "TorchCodec (`pip install 'spidr[extract]'`) and FFmpeg, or convert it to WAV or FLAC.",
                guide="questions.md#do-i-need-ffmpeg",
            ) from None
        raise InputError(f"{recording}: neither libsndfile nor FFmpeg can read it ({reason}).") from None
    wave = io.BytesIO()
    soundfile.write(wave, samples.data.numpy().T, samples.sample_rate, format="W64", subtype="FLOAT")
    return Recording(recording.path, content=wave.getvalue())


@cache
def _warn(name: str, problem: str) -> None:
    """Warn once per recording."""
    logger.warning("%s: %s.", name, problem)


class _File(soundfile.SoundFile):  # type: ignore[misc]
    """A file opened for reading, without soundfile's seek after each read, which is slow with FLAC."""

    def seekable(self) -> bool:
        """Say no, which avoids the seek; :meth:`seek` still works."""
        return False


def _open(recording: Recording) -> _File:
    if recording.content is None and recording.archive is None:
        check_exists(recording.path)
        file = _File(os.fsencode(recording.path))  # soundfile only takes names that are UTF-8
    else:
        raw: Any = _raw(recording)
        size = raw.seek(0, os.SEEK_END)
        raw.seek(0)
        # libsndfile reads a few kilobytes at a time, which is fastest from memory.
        in_memory = recording.content is not None or size <= READ_AT_ONCE
        file = _File(_Bytes(raw.read(size)) if in_memory else _Buffered(raw))
    if file.frames == 0 and file.format in ("WAV", "WAVEX"):
        with _raw(recording) as raw:
            data = raw.read()
        # The header of a WAV written to a pipe says 0 bytes: extend its data to the end of the file.
        at = data.find(b"data\0\0\0\0", 0, 4096) + 4
        if at >= 4 and len(data) > at + 4:
            file.close()
            return _File(_Bytes(data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :]))
    return file


def _raw(recording: Recording) -> IO[bytes] | Member:
    """The bytes of a recording's file, as a file."""
    if recording.content is not None:
        return io.BytesIO(recording.content)
    if recording.archive is not None:
        return Member(recording)
    check_exists(recording.path)
    return open(recording.path, "rb")  # noqa: PTH123


class _Unfailing:
    """A seek that never fails, as a damaged header may point before the start or far past the end.

    An exception in libsndfile's callback would only be printed. libsndfile checks the position anyway.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position if it is valid, and return the current one."""
        file: Any = super()
        with suppress(OSError, ValueError):
            if abs(offset) < UNKNOWN_LENGTH:
                file.seek(offset, whence)
        position: int = file.tell()
        return position


class _Bytes(_Unfailing, io.BytesIO):
    """Bytes for libsndfile."""


class _Buffered(_Unfailing, io.BufferedReader):
    """A file for libsndfile."""

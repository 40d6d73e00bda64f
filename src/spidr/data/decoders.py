"""Decode audio files with libsndfile, or TorchCodec where it cannot, and resample with soxr."""

from __future__ import annotations

import io
import logging
import os
import re
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import soundfile

from spidr.config import SAMPLE_RATE
from spidr.data.recording import Member, Recording, Source, as_recording, check_exists
from spidr.tools.errors import InputError
from spidr.tools.lazy import needs_extra
from spidr.tools.untrusted import check_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    Samples = NDArray[np.float32]

logger = logging.getLogger(__name__)

AUDIO = (
    *(".wav", ".wave", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf"),
    *(".w64", ".rf64", ".sph", ".nist", ".gsm", ".m4a", ".aac", ".wma", ".webm", ".mp4", ".mka", ".amr", ".3gp"),
)
"""Suffixes of recordings. How a file is decoded depends on its content only."""

PIECE = 1 << 22
"""Values to read at once: a header may promise more than the file, or the memory, holds."""

READ_AT_ONCE = 1 << 22
"""Archive members up to this many bytes are read whole, even for a part of them."""

UNKNOWN_LENGTH = 1 << 40
"""Two years of samples: libsndfile reports such lengths where a header leaves the length open."""

PLACEHOLDER = 0x7FF00000
"""Sizes from here on mean "unknown" in headers that FFmpeg and SoX write to pipes."""

OVERSHOOT = 0.5
"""Seconds by which a span may overshoot its recording, as in Kaldi's extract-segments."""


_SIZES = re.compile(r"^ *(?:data|Data Size|SSND|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
"""libsndfile's log of a file that is shorter, or longer, than its header says."""


class Decoder:
    """A recording opened with libsndfile.

    Attributes:
        name: What messages call it.
        source: What was opened.
        sample_rate: In Hz.
        channels: How many.
        frames: Samples per channel by the header; None if only decoding can tell.
        seekable: Whether a part can be read without decoding what comes before.
    """

    def __init__(self, source: Recording | bytes) -> None:
        self.name, self.source = _name(source), source
        self._file = _open(source)
        self.sample_rate, self.channels = int(self._file.samplerate), int(self._file.channels)
        self._header, self._position = int(self._file.frames), 0
        # The header of an MP3 says nothing, or nothing reliable.
        self.frames = self._header if self._header < UNKNOWN_LENGTH and self._file.format != "MP3" else None
        # After a seek in MP3, Vorbis and Opus, libsndfile decodes wrong samples.
        self.seekable = bool(soundfile.SoundFile.seekable(self._file)) and self._file.format not in ("MP3", "OGG")
        if promised := self._promised():
            _warn(self.name, "truncated: its header promises {} bytes, there are {}".format(*promised))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def length(self) -> int | None:
        """Samples per channel without decoding them; None if only decoding can tell.

        libsndfile takes FLAC's header at its word, so read the last sample; for other formats it looks at the file.
        """
        if self._file.format == "FLAC" and self.frames is not None and self.frames > 0:
            self._read(self.frames - 1, self.frames, clip=True)
        return self.frames

    def read(self, start: int = 0, stop: int | None = None) -> Samples:
        """Read samples ``start`` to ``stop``, float32 (stop - start, channels).

        Without ``stop``, read to the end; warn if that comes earlier than the header says.

        Raises:
            InputError: The file is damaged, or has no such samples.
        """
        return self._read(start, stop, clip=stop is None)

    def blocks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Samples]:
        """Yield samples ``start`` to ``stop`` in blocks of ``size``."""
        while stop is None or start < stop:
            end = start + size if stop is None else min(start + size, stop)
            block = self._read(start, end, clip=stop is None)
            yield block
            if len(block) < size:
                break
            start = end

    def _read(self, start: int, stop: int | None, *, clip: bool) -> Samples:
        """Read as :meth:`read`; with ``clip``, up to the end at most."""
        if stop is not None and not clip and self.frames is not None and stop > self.frames:
            raise InputError(f"{self.name}: has {self.frames} samples; asked for were those up to {stop}.")
        end = stop if self.frames is None or not clip else min(self.frames, stop or self.frames)
        if clip and end is not None and start >= end:
            return np.empty((0, self.channels), np.float32)
        begin = start if self.seekable or start == self._position else 0
        # libsndfile decodes int16 several times as fast as float; scaled here, the bits are the same.
        dtype = "int16" if self._file.subtype == "PCM_16" else "float32"
        try:
            if begin != self._position and self.seekable:
                self._file.seek(begin)
            elif begin != self._position:
                self._file.close()
                self._file = _open(self.source)
            samples = self._pieces(None if end is None else end - begin, dtype)
            self._position = begin + len(samples)
            broken = ""
        except soundfile.LibsndfileError as error:
            broken, samples = error.error_string or "libsndfile says no more", np.empty((0, self.channels), dtype)
        if self.frames is not None and end is not None and (broken or len(samples) < end - begin):
            there = self._readable()
            if there not in (0, self.frames):
                _warn(self.name, f"shorter than its header says: {there} of {self.frames} samples")
                self._file, self._position, self.frames = _open(self.source), 0, there
                return self._read(min(start, there), stop, clip=clip)
        if broken:
            raise InputError(f"{self.name}: damaged or truncated near sample {start} ({broken}).")
        if stop is not None and not clip and begin + len(samples) < stop:
            raise InputError(f"{self.name}: has {begin + len(samples)} samples; asked for were those up to {stop}.")
        at_end = clip and (end is None or begin + len(samples) < end)
        if self.frames is None and at_end and self._position < 0.98 * self._header < UNKNOWN_LENGTH:
            _warn(self.name, f"shorter than its header says: {self._position} of {self._header} samples")
        samples = samples[start - begin :]
        return np.multiply(samples, np.float32(2**-15), dtype=np.float32) if dtype == "int16" else samples

    def _pieces(self, count: int | None, dtype: str) -> NDArray[Any]:
        """Read up to ``count`` samples from the file's position (None: all)."""
        pieces: list[NDArray[Any]] = []
        length, piece = 0, max(1, PIECE // self.channels)
        while not pieces or len(pieces[-1]) > 0:
            left = piece if count is None else min(piece, count - length)
            pieces.append(self._file.read(left, dtype=dtype, always_2d=True))
            length += len(pieces[-1])
            check_memory(8 * length * self.channels, self.name)
            if length == count:
                break
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _promised(self) -> tuple[int, int] | None:
        """Bytes that the header promises and bytes that there are, if those are fewer."""
        for promised, there in re.findall(_SIZES, self._file.extra_info):
            if int(there) < int(promised) < PLACEHOLDER:
                return int(promised), int(there)
        return None

    def _readable(self) -> int:
        """How many samples can be read from the beginning: all if the last one can, else found by bisection."""

        def has(position: int) -> bool:
            file = _open(self.source)
            try:
                file.seek(position)
                return len(file.read(1)) == 1
            except soundfile.LibsndfileError:
                return False
            finally:
                file.close()

        assert self.frames is not None
        low, high = 0, self.frames
        if has(high - 1):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if has(middle - 1) else (low, middle)
        return low


class Decoded:
    """A recording that only TorchCodec reads: decoded whole, with the attributes and methods of :class:`Decoder`."""

    seekable = False

    def __init__(self, source: Recording | bytes, reason: str) -> None:
        self.name, self.source = _name(source), source
        with _raw(source) as file:
            data = file.read()
        try:
            decoder_class = import_module("torchcodec.decoders").AudioDecoder
            decoder = decoder_class(data)
            if decoder.metadata.codec == "opus":  # FFmpeg would decode Opus to 48 kHz.
                decoder = decoder_class(data, sample_rate=SAMPLE_RATE)
            samples = decoder.get_all_samples()
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            if isinstance(error, (ImportError, OSError)) or "libtorchcodec" in str(error):
                raise InputError(
                    f"{self.name}: libsndfile cannot read it ({reason}); if it is M4A, WebM or the like, install "
                    "TorchCodec (`pip install 'spidr[extract]'`) and FFmpeg, or convert it to WAV or FLAC.",
                    guide="questions.md#do-i-need-ffmpeg",
                ) from None
            raise InputError(f"{self.name}: neither libsndfile nor FFmpeg can read it ({reason}).") from None
        self._samples = np.ascontiguousarray(samples.data.numpy().T)
        self.sample_rate, self.channels, self.frames = samples.sample_rate, self._samples.shape[1], len(self._samples)

    def close(self) -> None:
        """Nothing is open."""

    def length(self) -> int:
        """As :meth:`Decoder.length`."""
        return self.frames

    def read(self, start: int = 0, stop: int | None = None) -> Samples:
        """As :meth:`Decoder.read`."""
        if stop is not None and stop > self.frames:
            raise InputError(f"{self.name}: has {self.frames} samples; asked for were those up to {stop}.")
        return self._samples[start:stop]

    def blocks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Samples]:
        """As :meth:`Decoder.blocks`."""
        samples = self.read(start, stop)
        yield from (samples[i : i + size] for i in range(0, len(samples), size))


@contextmanager
def decoder(source: Source) -> Iterator[Decoder | Decoded]:
    """Open a recording with whatever reads it.

    Raises:
        InputError: It is missing, empty or damaged, or nothing installed reads it.
    """
    recording = as_recording(source)
    try:
        try:
            opened: Decoder | Decoded = Decoder(recording)
        except soundfile.LibsndfileError as error:
            opened = Decoded(recording, _why(recording, error))
        try:
            yield opened
        finally:
            opened.close()
    except OSError as error:
        raise InputError(f"{_name(recording)}: cannot be read ({error.strerror or error}).") from None


def _name(source: Recording | bytes) -> str:
    return f"<{len(source)} bytes of audio>" if isinstance(source, bytes) else str(source)


def _raw(source: Recording | bytes) -> IO[bytes] | Member:
    """The bytes of a recording's file, as a file."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if source.archive is not None:
        return Member(source)
    check_exists(source.path)
    return open(source.path, "rb")  # noqa: PTH123


def resampled(blocks: Iterable[Samples], sample_rate: int) -> Iterator[Samples]:
    """Mix blocks of samples (N, channels) down to one channel and resample them to 16 kHz, float32 (M,) each."""
    with needs_extra("extract"):
        import soxr

    stream = soxr.ResampleStream(sample_rate, SAMPLE_RATE, 1, dtype="float32") if sample_rate != SAMPLE_RATE else None
    for block in blocks:
        mono = block[:, 0] if block.shape[1] == 1 else block.mean(1, dtype=np.float32)
        yield mono if stream is None else stream.resample_chunk(np.ascontiguousarray(mono))
    if stream is not None:
        yield stream.resample_chunk(np.empty(0, np.float32), last=True)


def _why(source: Recording | bytes, error: soundfile.LibsndfileError) -> str:
    """Why libsndfile does not read a file. Raises InputError if it is empty."""
    with _raw(source) as file:
        if not file.read(1):
            raise InputError(f"{_name(source)}: the file is empty.")
    return "format not recognised" if error.code in (1, 7) else error.error_string.rstrip(".").lower()


@cache
def _warn(name: str, problem: str) -> None:
    """Warn once per recording."""
    logger.warning("%s: %s.", name, problem)


class _File(soundfile.SoundFile):  # type: ignore[misc]
    """A file opened for reading, without soundfile's seek to the current position after each read: slow with FLAC."""

    def seekable(self) -> bool:
        """Say no, which spares the seek; :meth:`seek` works all the same."""
        return False


def _open(source: Recording | bytes) -> _File:
    if isinstance(source, bytes) or source.archive is not None:
        file = _File(_for_libsndfile(_raw(source)))
    else:
        check_exists(source.path)
        file = _File(os.fsencode(source.path))  # soundfile takes no name that is not UTF-8
    if file.frames == 0 and file.format in ("WAV", "WAVEX"):
        with _raw(source) as raw:
            data = raw.read()
        if whole := _with_open_end(data):
            file.close()
            return _File(_Bytes(whole))
    return file


def _with_open_end(data: bytes) -> bytes | None:
    """Make the data chunk of a WAV written to a pipe, whose header says 0 bytes, extend to the end of the file."""
    position = data.find(b"data\0\0\0\0", 0, 4096)
    if position < 0 or len(data) <= position + 8:
        return None
    return data[: position + 4] + b"\xff\xff\xff\xff" + data[position + 8 :]


def _for_libsndfile(file: Any) -> Any:
    # libsndfile asks for a few kilobytes at a time: fastest from memory.
    small = isinstance(file, io.BytesIO) or file.seek(0, os.SEEK_END) <= READ_AT_ONCE
    file.seek(0)
    return _Bytes(file.read()) if small else _Buffered(file)


class _Unfailing:
    """Seeks that never fail: a damaged header may lead before the beginning or far past the end.

    An exception could not leave libsndfile's callback; it would be printed. libsndfile checks the position anyway.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position if it is valid, and return the current one."""
        file: Any = super()
        try:
            if abs(offset) < UNKNOWN_LENGTH:
                file.seek(offset, whence)
        except (OSError, ValueError):
            pass
        position: int = file.tell()
        return position


class _Bytes(_Unfailing, io.BytesIO):
    """Bytes for libsndfile."""


class _Buffered(_Unfailing, io.BufferedReader):
    """A file for libsndfile."""

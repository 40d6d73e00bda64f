"""Reading recordings: exact lengths, samples and ranges of samples, from files, archives and bytes.

WAV and FLAC are read by libsndfile, which needs nothing else on the machine and reads a range without decoding the
rest. All other formats are decoded by TorchCodec, imported here only.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import soundfile

from spidr.config import SAMPLE_RATE
from spidr.data.archive import Member
from spidr.tools.errors import InputError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

BLOCK = 1 << 16
"""Samples per block when statistics are gathered: it stays in the cache, and sums over it are exact enough."""

EPS = 1e-5
"""Added to the variance when an utterance is standardised."""

PIECE = 1 << 24
"""Samples to read at once: a header may promise more than there are, or than there is memory."""

HEADER = 4096
"""Bytes at the beginning of a file in which the header of a WAV is looked for."""

READ_AT_ONCE = 1 << 22
"""Members of archives up to this many bytes are read whole, also for a part of them."""

PLAIN_FORMAT = struct.pack("<HHIIHH", 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
"""Format chunk of a WAV of 16-bit integers, one channel, at the one rate there is."""

UNKNOWN_LENGTH = 1 << 40
"""No recording is that long (two years): libsndfile gives such numbers where a header leaves the length open."""


class Recording(NamedTuple):
    """Where a recording is: a file, or ``byte_size`` bytes of an uncompressed archive.

    ``mean`` and ``std`` are those of its samples, if known.
    """

    path: str
    archive: str | None = None
    byte_offset: int = 0
    byte_size: int = 0
    mean: float | None = None
    std: float | None = None

    def member(self) -> Member | None:
        """The recording's bytes in its archive; None if it is a file of its own."""
        if self.archive is None:
            return None
        return Member(self.archive, self.path, self.byte_offset, self.byte_size)

    def __str__(self) -> str:
        return self.path if self.archive is None else f"{self.archive}:{self.path}"


Source = str | Path | bytes | Recording


class FormatError(InputError):
    """A recording is not 16 kHz mono. :func:`read_resampled` reads it all the same."""


def num_samples(source: Source, *, verify: bool = False) -> int:
    """Exact number of samples of a recording.

    Args:
        source: A path, the bytes of an audio file, or a row of a manifest.
        verify: Decode everything, so that a damaged recording is found, or a truncated one, unless it is a WAV: of
            that, what is there counts. Without it, only the header of WAV and FLAC is read; other formats have no exact
            length in their header and are always decoded.

    Raises:
        InputError: The recording is missing, damaged or empty, or not 16 kHz mono.
    """
    if verify or not can_seek(source):
        return len(read_audio(source))
    with _reading(source):
        with _raw(source) as raw:
            if samples := _plain_wav(raw)[1] or _plain_flac(raw):
                return samples
        with _open(source) as file:
            return _frames(source, file)


def read_audio(source: Source, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
    """Samples ``start`` to ``stop`` (default: to the end) of a recording.

    Args:
        source: A path, the bytes of an audio file, or a row of a manifest.
        start: First sample, counted from 0.
        stop: One past the last sample.

    Returns:
        float32 array (stop - start,), in [-1, 1] for integer formats.

    Raises:
        InputError: The recording is missing, damaged or empty, not 16 kHz mono, or holds samples that are not finite.
    """
    with _reading(source):
        if not can_seek(source):
            return _decode(source)[start:stop]
        if (samples := _read_plain(source, start, stop)) is not None:
            return samples
        with _open(source) as file:
            frames = _frames(source, file)
            return _read(source, file, start, frames if stop is None else stop)


def read_resampled(source: Source) -> NDArray[np.float32]:
    """All samples of a recording, mixed down to mono and resampled to 16 kHz by FFmpeg, if it is not that already.

    Raises:
        InputError: The recording is missing, damaged or empty, or TorchCodec or FFmpeg is not there.
    """
    try:
        return read_audio(source)
    except FormatError:
        return _decode(source, resample=True)


def resampled_length(source: Source) -> int:
    """About as many samples as :func:`read_resampled` gives, by the header if there is one."""
    try:
        return num_samples(source)
    except FormatError:
        seconds = _with_torchcodec(source, lambda decoder_class, data: decoder_class(data).metadata.duration_seconds)
        return round((seconds or 0) * SAMPLE_RATE)


def statistics(source: Source) -> tuple[float, float]:
    """Mean and (population) standard deviation of a recording, decoded block by block, in little memory."""
    return _moments(_blocks(source))


def statistics_of(samples: NDArray[np.float32]) -> tuple[float, float]:
    """Mean and (population) standard deviation of samples: bit for bit those of :func:`statistics`."""
    return _moments(samples[i : i + BLOCK] for i in range(0, len(samples), BLOCK))


def standardize(samples: NDArray[np.float32], mean: float, std: float, out: NDArray[np.float32]) -> None:
    """Write ``(samples - mean) / sqrt(std ** 2 + 1e-5)`` to ``out``."""
    np.subtract(samples, np.float32(mean), out=out)
    np.multiply(out, np.float32(1 / np.sqrt(std * std + EPS)), out=out)


def can_seek(source: Source) -> bool:
    """Whether libsndfile reads the source, so that a range of it can be read without decoding the rest."""
    if isinstance(source, bytes):
        return source[:4] in (b"RIFF", b"RF64", b"fLaC")
    return str(source).lower().endswith((".wav", ".flac"))


@contextmanager
def _reading(source: Source) -> Iterator[None]:
    """An error of the disk becomes one that names the recording."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{_name(source)}: cannot be read ({error.strerror or error}).") from None


def _raw(source: Source) -> io.RawIOBase | io.BytesIO:
    """The bytes of a recording; none of a file that cannot be opened, about which libsndfile will complain."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, Recording):
        if member := source.member():
            return member
        source = source.path
    _check_regular(source)
    try:
        return open(source, "rb", buffering=0)  # noqa: PTH123
    except OSError:
        return io.BytesIO()


def _plain_wav(raw: io.RawIOBase | io.BytesIO) -> tuple[int, int]:
    """Where the samples of a WAV of 16 kHz, mono, 16 bits begin, and how many there are; (0, 0) for all else.

    All else libsndfile has to judge. Takes a quarter of the time: with millions of recordings, minutes.
    """
    header = raw.read(HEADER) or b""
    if header[:4] != b"RIFF" or header[8:12] != b"WAVE":
        return 0, 0
    position, is_plain = 12, False
    while position + 8 <= len(header):
        name, length = struct.unpack_from("<4sI", header, position)
        position += 8
        if name == b"data":
            whole = position + length <= raw.seek(0, os.SEEK_END)
            return (position, length // 2) if is_plain and length % 2 == 0 and whole else (0, 0)
        if name == b"fmt ":
            is_plain = header[position : position + length] == PLAIN_FORMAT
        elif name not in (b"LIST", b"JUNK"):
            return 0, 0
        position += length + length % 2
    return 0, 0


def _plain_flac(raw: io.RawIOBase | io.BytesIO) -> int:
    """Number of samples by the header of a FLAC of 16 kHz, mono, 16 bits; 0 for all else, as for :func:`_plain_wav`."""
    raw.seek(0)
    header = raw.read(HEADER) or b""
    if header[:4] != b"fLaC" or header[4:5] not in (b"\x00", b"\x80") or header[5:8] != b"\0\0\x22":
        return 0
    format_and_samples = int.from_bytes(header[18:26], "big")
    if format_and_samples >> 36 != SAMPLE_RATE << 8 | 15:  # 20 bits of rate, 3 of channels - 1, 5 of bits - 1
        return 0
    is_last, position = header[4] >> 7, 42
    while not is_last:  # the blocks of metadata
        if position + 4 > len(header) or header[position] & 127 == 127:
            return 0
        is_last, length = header[position] >> 7, int.from_bytes(header[position + 1 : position + 4], "big")
        position += 4 + length
    frame = header[position : position + 2]
    is_frame = position >= len(header) - 1 or (frame[0] == 255 and frame[1] >> 2 == 62)
    return format_and_samples & (1 << 36) - 1 if is_frame and position + 2 <= raw.seek(0, os.SEEK_END) else 0


def _read_plain(source: Source, start: int, stop: int | None) -> NDArray[np.float32] | None:
    """Samples of a plain WAV, straight from the file or archive; None for what libsndfile has to judge."""
    if not isinstance(source, bytes) and str(source).lower().endswith(".flac"):
        return None
    with _raw(source) as raw:
        position, count = _plain_wav(raw)
        stop = count if stop is None else stop
        if not 0 <= start < stop <= count:
            return None
        samples = np.empty(stop - start, dtype="<i2")
        raw.seek(position + 2 * start)
        if raw.readinto(samples.view(np.uint8)) != samples.nbytes:
            return None
    return np.multiply(samples, np.float32(2**-15), dtype=np.float32)


def _moments(blocks: Iterator[NDArray[np.float32]]) -> tuple[float, float]:
    """Mean and standard deviation of all blocks, merged in float64 (Chan, Golub and LeVeque, 1979)."""
    count, mean, squares = 0, 0.0, 0.0
    for block in blocks:
        block_mean = float(block.sum()) / len(block)
        deviations = block - np.float32(block_mean)
        np.square(deviations, out=deviations)
        total, delta = count + len(block), block_mean - mean
        squares += float(deviations.sum()) + delta * delta * count * len(block) / total
        mean += delta * len(block) / total
        count = total
    return mean, float(np.sqrt(squares / count))


def _blocks(source: Source) -> Iterator[NDArray[np.float32]]:
    if not can_seek(source):
        samples = read_audio(source)
        yield from (samples[i : i + BLOCK] for i in range(0, len(samples), BLOCK))
        return
    with _reading(source), _open(source) as file:
        frames = _frames(source, file)
        for start in range(0, frames, BLOCK):
            yield _read(source, file, start, min(start + BLOCK, frames))


def _is_file(source: Source) -> bool:
    return isinstance(source, (str, Path)) or (isinstance(source, Recording) and source.archive is None)


def _name(source: Source) -> str:
    return f"<{len(source)} bytes of audio>" if isinstance(source, bytes) else str(source)


class _File(soundfile.SoundFile):  # type: ignore[misc]
    """A file that is only read.

    For the sake of files that are written, too, soundfile seeks after each read to where the file is already. With FLAC
    that is a good part of what comes on top of decoding.
    """

    def seekable(self) -> bool:
        """Say no, and be spared that. :meth:`seek` works all the same."""
        return False


def _open(source: Source) -> soundfile.SoundFile:
    if _is_file(source):
        _check_regular(str(source))
    try:
        file = _File(_input(source))
    except soundfile.LibsndfileError as error:
        if _is_file(source):
            _check_file(str(source))
        raise InputError(f"{_name(source)}: not a readable WAV or FLAC recording ({error.error_string}).") from None
    try:
        _check_format(source, file.samplerate, file.channels)
    except InputError:
        file.close()
        raise
    return file


class _Unfailing:
    """Seeks as libsndfile wants it, which a damaged header may lead to before the beginning or far past any end.

    An error could not come out of its call but as a traceback on standard error; it sees where it is.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position, if it is one. Returns where it is."""
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


def _input(source: Source) -> Any:
    """What libsndfile can open: a path or a binary file object."""
    if isinstance(source, bytes):
        return _Bytes(source)
    if isinstance(source, Recording):
        if (member := source.member()) is None:
            return os.fsencode(source.path)
        # A file of Python's is asked for a few kilobytes at a time, which bytes in memory answer fastest.
        return _Bytes(member.readall()) if source.byte_size <= READ_AT_ONCE else _Buffered(member)
    return os.fsencode(source)  # soundfile would not take a name that is no UTF-8


def _check_regular(path: str | Path) -> None:
    """Refuse what reading could wait for: pipes and devices. What does not exist is complained about later."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116
    except OSError:
        return
    except ValueError as error:  # a NUL character
        raise InputError(f"{path!r}: not the name of a file ({error}).") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: not a regular file.")


def _check_file(path: str) -> None:
    _check_regular(path)
    try:
        size = os.stat(path).st_size  # noqa: PTH116
        with open(path, "rb"):  # noqa: PTH123
            pass
    except FileNotFoundError:
        raise InputError(f"{path}: the file does not exist. Was it moved since the manifest was written?") from None
    except OSError as error:
        raise InputError(f"{path}: the file cannot be opened ({error.strerror}).") from None
    if size == 0:
        raise InputError(f"{path}: the file is empty.")


def _check_format(source: Source, sample_rate: int, channels: int) -> None:
    if sample_rate != SAMPLE_RATE:
        raise FormatError(f"{_name(source)}: the sample rate is {sample_rate} Hz; resample it to {SAMPLE_RATE} Hz.")
    if channels != 1:
        raise FormatError(f"{_name(source)}: the recording has {channels} channels; mix it down to one.")


def _check_finite(source: Source, samples: NDArray[np.float32]) -> None:
    # One sum finds NaN and infinity, which survive it, and what is so large that its variance would be infinite.
    if not np.isfinite(np.vdot(samples, samples)):
        raise InputError(f"{_name(source)}: the recording holds samples that are not finite numbers or much too large.")


def _frames(source: Source, file: soundfile.SoundFile) -> int:
    frames = int(file.frames)
    if frames <= 0:
        raise InputError(f"{_name(source)}: the recording has no samples.")
    if frames >= UNKNOWN_LENGTH:
        raise InputError(
            f"{_name(source)}: the header does not say how long the recording is (it was written to a pipe); convert "
            "it once more, from file to file."
        )
    return frames


def _read(source: Source, file: soundfile.SoundFile, start: int, stop: int) -> NDArray[np.float32]:
    # libsndfile is several times as fast to int16 as to float; the product gives the same bits as its own conversion.
    dtype = "int16" if file.subtype == "PCM_16" else "float32"
    try:
        if file.tell() != start:
            file.seek(start)
        samples = _read_pieces(file, stop - start, dtype)
    except soundfile.LibsndfileError as error:
        raise InputError(f"{_name(source)}: damaged or truncated near sample {start} ({error.error_string}).") from None
    if len(samples) < stop - start:
        if stop > file.frames:
            raise InputError(f"{_name(source)}: has {file.frames} samples; asked for were those up to {stop}.")
        found = start + len(samples)
        raise InputError(f"{_name(source)}: truncated: the header promises {file.frames} samples, {found} can be read.")
    if dtype == "int16":
        return np.multiply(samples, np.float32(2**-15), dtype=np.float32)
    _check_finite(source, samples)
    return samples


def _read_pieces(file: soundfile.SoundFile, count: int, dtype: str) -> NDArray[Any]:
    """So many samples from where the file is, or as many as there are."""
    pieces: list[NDArray[Any]] = []
    while not pieces or (count > 0 and len(pieces[-1]) > 0):
        pieces.append(file.read(min(count, PIECE), dtype=dtype))
        count -= len(pieces[-1])
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _decode(source: Source, *, resample: bool = False) -> NDArray[np.float32]:
    """All samples of a recording that libsndfile does not read, or that is not 16 kHz mono."""

    def decode(decoder_class: Any, data: Any) -> Any:
        decoder = decoder_class(data)
        metadata = decoder.metadata
        if resample:
            decoder = decoder_class(data, sample_rate=SAMPLE_RATE, num_channels=1)
        elif metadata.codec == "opus":  # Has no sample rate of its own: FFmpeg always decodes it to 48 kHz.
            decoder = decoder_class(data, sample_rate=SAMPLE_RATE)
        else:
            _check_format(source, metadata.sample_rate, metadata.num_channels)
        return decoder.get_all_samples().data

    samples = _with_torchcodec(source, decode)
    _check_format(source, SAMPLE_RATE, samples.shape[0])
    if samples.shape[1] == 0:
        raise InputError(f"{_name(source)}: the recording has no samples.")
    decoded: NDArray[np.float32] = samples[0].numpy()
    _check_finite(source, decoded)
    return decoded


def _with_torchcodec(source: Source, function: Callable[[Any, Any], Any]) -> Any:
    """What a function gives of TorchCodec's decoder class and of the recording as that class takes it."""
    data: Any = source
    if _is_file(source):
        data = str(source)
        _check_file(data)
    elif isinstance(source, Recording) and (member := source.member()):
        data = member.readall()
    try:
        return function(import_module("torchcodec.decoders").AudioDecoder, data)
    except InputError:
        raise
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, (ImportError, OSError)) or "libtorchcodec" in str(error):
            raise InputError(
                f"{_name(source)}: resampling, and formats other than WAV and FLAC, need TorchCodec and FFmpeg: "
                "`pip install 'spidr[extract]'`, and install FFmpeg with conda or your system's package manager."
            ) from None
        raise InputError(f"{_name(source)}: cannot be decoded ({first_line(error)}).") from None

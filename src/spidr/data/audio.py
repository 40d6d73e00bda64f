"""Read recordings, 16 kHz mono: lengths, samples, streams and statistics."""

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from spidr.config import SAMPLE_RATE
from spidr.data.decoders import Decoder, decoder, resampled
from spidr.data.recording import Recording, Source
from spidr.tools.errors import InputError

Samples = NDArray[np.float32]

BLOCK = 1 << 16  # samples per block of statistics: small enough for the cache and for exact sums
EPS = 1e-5  # added to the variance when an utterance is standardised


class FormatError(InputError):
    """A recording is not 16 kHz mono; :func:`read_resampled` converts it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, guide="questions.md#my-recordings-have-another-sample-rate")


def num_samples(source: Source, *, verify: bool = False) -> int:
    """Count the samples of a recording, exactly.

    Args:
        source: A path, the bytes of an audio file, or a recording of a manifest.
        verify: Decode everything to find damage. Otherwise read the header only, unless it does not give the length
            (MP3, files written to a pipe).

    Raises:
        InputError: The recording is missing, damaged or empty, or not 16 kHz mono.
    """
    if verify:
        return len(read_audio(source))
    with decoder(source) as file:
        _check_format(file)
        begin, end = _span(file)
        return end - begin


def seekable_length(source: Source) -> int | None:
    """Count the samples of a recording; None if reading a part requires decoding everything before it."""
    with decoder(source) as file:
        _check_format(file)
        begin, end = _span(file)
        return end - begin if file.seekable else None


def read_audio(source: Source, start: int = 0, stop: int | None = None) -> Samples:
    """Read samples ``start`` to ``stop`` (None: to the end) of a recording.

    Args:
        source: A path, the bytes of an audio file, or a recording of a manifest.
        start: First sample, counted from 0.
        stop: One past the last sample.

    Returns:
        float32 array (stop - start,), in [-1, 1] for integer formats.

    Raises:
        InputError: The recording is missing, damaged or empty, not 16 kHz mono, or holds samples that are not finite.
    """
    with decoder(source) as file:
        _check_format(file)
        samples = file.read(*_range(file, start, stop))[:, 0]
        _check_finite(file.name, samples)
        if len(samples) == 0:
            raise InputError(f"{file.name}: the recording has no samples.")
        return samples


def read_resampled(source: Source) -> Samples:
    """Read a whole recording, converted to 16 kHz mono if need be.

    Raises:
        InputError: The recording is missing, damaged or empty.
    """
    blocks = list(stream(source, resample=True))
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def resampled_length(source: Source) -> int:
    """Estimate, within a few, how many samples :func:`read_resampled` returns."""
    with decoder(source) as file:
        begin, end = _span(file)
        return round((end - begin) * SAMPLE_RATE / file.sample_rate)


def stream(source: Source, *, resample: bool = False, size: int = BLOCK) -> Iterator[Samples]:
    """Yield the samples of a recording in blocks of about ``size``, using little memory.

    With ``resample``, recordings that are not 16 kHz mono are converted. Raises InputError as :func:`read_audio`.
    """
    with decoder(source) as file:
        if not resample:
            _check_format(file)
        count = 0
        for block in resampled(file.blocks(size, *_range(file, 0, None)), file.sample_rate):
            if len(block) > 0:
                _check_finite(file.name, block)
                count += len(block)
                yield block
        if count == 0:
            raise InputError(f"{file.name}: the recording has no samples.")


def statistics(source: Source) -> tuple[float, float]:
    """Mean and population standard deviation of a recording, computed in little memory."""
    return _moments(stream(source))


def statistics_of(samples: Samples) -> tuple[float, float]:
    """Mean and population standard deviation of samples, bit for bit those of :func:`statistics`."""
    return _moments(samples[i : i + BLOCK] for i in range(0, len(samples), BLOCK))


def standardize(samples: Samples, mean: float, std: float, out: Samples) -> None:
    """Write ``(samples - mean) / sqrt(std ** 2 + 1e-5)`` to ``out``."""
    np.subtract(samples, np.float32(mean), out=out)
    np.multiply(out, np.float32(1 / np.sqrt(std * std + EPS)), out=out)


def _moments(blocks: Iterable[Samples]) -> tuple[float, float]:
    """Mean and standard deviation of all blocks, merged in float64 (Chan, Golub and LeVeque, 1979)."""
    count, mean, squares = 0, 0.0, 0.0
    for block in blocks:
        block_mean = float(block.sum(dtype=np.float64)) / len(block)
        deviations = block - np.float32(block_mean)
        np.square(deviations, out=deviations)
        total, delta = count + len(block), block_mean - mean
        squares += float(deviations.sum(dtype=np.float64)) + delta * delta * count * len(block) / total
        mean += delta * len(block) / total
        count = total
    return mean, float(np.sqrt(squares / count))


def _range(file: Decoder, start: int, stop: int | None) -> tuple[int, int | None]:
    """Translate a range of a recording into one of its file."""
    if file.recording.start is file.recording.end is None:
        return start, stop
    begin, end = _span(file)
    if stop is not None and begin + stop > end:
        raise InputError(f"{file.name}: has {end - begin} samples, fewer than the {stop} requested.")
    return begin + start, end if stop is None else begin + stop


def _span(file: Decoder) -> tuple[int, int]:
    """Start and end of a recording in its file, in samples."""
    recording, known = file.recording, file.length()
    frames = _count(recording._replace(start=None, end=None)) if known is None else known
    if frames <= 0:
        raise InputError(f"{file.name}: the recording has no samples.")
    begin = round((recording.start or 0) * file.sample_rate)
    end = frames if recording.end is None else round(recording.end * file.sample_rate)
    # A span may overshoot its recording by half a second, as in Kaldi's extract-segments.
    if end > frames + 0.5 * file.sample_rate or begin >= min(end, frames):
        raise InputError(f"{file.name}: not within the {frames / file.sample_rate:g} s that the recording lasts.")
    return begin, min(end, frames)


@lru_cache(maxsize=1 << 16)  # a long recording may be cropped often
def _count(recording: Recording) -> int:
    with decoder(recording) as file:
        return len(file.read())


def _check_format(file: Decoder) -> None:
    if file.sample_rate != SAMPLE_RATE:
        raise FormatError(f"{file.name}: the sample rate is {file.sample_rate} Hz; resample it to {SAMPLE_RATE} Hz.")
    if file.channels != 1:
        raise FormatError(f"{file.name}: the recording has {file.channels} channels; mix it down to one.")


def _check_finite(name: str, samples: Samples) -> None:
    # The sum of squares is finite unless a sample is NaN, infinite, or too large to standardise.
    if not np.isfinite(np.vdot(samples, samples)):
        raise InputError(f"{name}: the recording holds samples that are not finite numbers or much too large.")

"""Measure how much the units change when the sound changes but the words do not.

The measure is the unit edit distance of Gat et al. (arXiv 2209.15483): the Levenshtein distance between the units of
the original and of the changed sound, both with repeats merged, divided by the number of the former.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from spidr.config import SAMPLE_RATE
from spidr.evaluate.model import chosen_layers
from spidr.models import DinoSR
from spidr.tools.errors import InputError
from spidr.tools.frames import receptive_field
from spidr.tools.lazy import needs_extra
from spidr.tools.waveforms import standardise


def gain(waveform: Tensor, decibels: float) -> Tensor:
    """A louder or quieter waveform (S,)."""
    return waveform * 10 ** (decibels / 20)


def noise(waveform: Tensor, snr: float, generator: torch.Generator) -> Tensor:
    """A waveform (S,) with white Gaussian noise, at a signal-to-noise ratio in dB over its whole length."""
    power = waveform.square().mean() / 10 ** (snr / 10)
    return waveform + power.sqrt() * torch.randn(waveform.shape, generator=generator)


def reverberation(waveform: Tensor, rt60: float, generator: torch.Generator) -> Tensor:
    """A waveform (S,) in a room.

    The room's response is the direct sound, then as much energy of white Gaussian noise that decays exponentially, by
    60 dB in ``rt60`` seconds (Polack, 1988; Moorer, 1979).
    """
    time = torch.arange(1, round(rt60 * SAMPLE_RATE)) / SAMPLE_RATE
    tail = torch.randn(len(time), generator=generator) * torch.exp(-3 * math.log(10) * time / rt60)
    response = torch.cat([torch.ones(1), tail / tail.norm()])
    size = len(waveform) + len(response)
    spectrum = torch.fft.rfft(waveform, size) * torch.fft.rfft(response, size)
    return torch.fft.irfft(spectrum, size)[: len(waveform)]


def tempo(waveform: Tensor, factor: float, window: int = 480, search: int = 160) -> Tensor:
    """A waveform (S,) played ``factor`` times as fast, at the same pitch.

    By WSOLA (Verhelst and Roelands, 1993): 30 ms windows that overlap by half are taken from where the tempo puts them,
    shifted by up to 10 ms to match what followed the previous window.
    """
    hop, length = window // 2, round(len(waveform) / factor)
    padded = F.pad(waveform, (search, 2 * search + 2 * window))
    fade = torch.hann_window(window)
    output = torch.zeros(length + 2 * window)
    follows = padded[search : search + window]
    for start in range(0, length + window, hop):
        first = min(int(start * factor), len(padded) - window - 2 * search - hop)  # of the candidates
        candidates = padded[first : first + window + 2 * search].unfold(0, window, 1)
        best = first + int((candidates @ follows).argmax())
        output[start : start + window] += padded[best : best + window] * fade
        follows = padded[best + hop : best + hop + window]
    output[:hop] /= fade[:hop].clamp(min=1e-3)  # where there is no window before the first
    return output[:length]


def pitch(waveform: Tensor, semitones: float) -> Tensor:
    """A waveform (S,) raised by some semitones at the same tempo: slowed down, then played faster."""
    factor = 2 ** (semitones / 12)
    slow = tempo(waveform, 1 / factor)
    spectrum, length = torch.fft.rfft(slow), len(waveform)  # resampled by Fourier's method
    bins = length // 2 + 1
    cut = F.pad(spectrum[:bins], (0, max(0, bins - len(spectrum))))
    return torch.fft.irfft(cut, length) * length / len(slow)


CHANGES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "gain -20 dB": lambda x, _: gain(x, -20),
    "gain -40 dB": lambda x, _: gain(x, -40),
    "noise 20 dB": lambda x, generator: noise(x, 20, generator),
    "noise 10 dB": lambda x, generator: noise(x, 10, generator),
    "reverb 0.3 s": lambda x, generator: reverberation(x, 0.3, generator),
    "tempo 0.9": lambda x, _: tempo(x, 0.9),
    "tempo 1.1": lambda x, _: tempo(x, 1.1),
    "pitch -2": lambda x, _: pitch(x, -2),
    "pitch +2": lambda x, _: pitch(x, 2),
}
"""Column of the table → what is done to the sound."""


def merged(units: Sequence[int] | NDArray[Any]) -> NDArray[Any]:
    """Units with repeats merged."""
    units = np.asarray(units)
    return units[np.flatnonzero(np.diff(units, prepend=units[:1] - 1))]


def edit_distance(a: Sequence[int] | NDArray[Any], b: Sequence[int] | NDArray[Any]) -> int:
    """Levenshtein distance between two sequences, a row of its table at a time."""
    b = np.asarray(b)
    steps = np.arange(len(b) + 1)
    row = steps
    for i, unit in enumerate(a, start=1):
        best = np.minimum(row[1:] + 1, row[:-1] + (b != unit))
        row = np.minimum.accumulate(np.concatenate([[i], best]) - steps) + steps
    return int(row[-1])


@torch.no_grad()
def evaluate_robustness(
    model: DinoSR,
    manifest: str | Path,
    *,
    layers: Sequence[int] | None = None,
    max_minutes: float = 10.0,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Compare the units of recordings before and after each of :data:`CHANGES`.

    Args:
        model: Any model with codebooks; it is moved to the device.
        manifest: The recordings; each is changed, standardised and encoded whole.
        layers: Those with a codebook, counted from 1; None: all.
        max_minutes: Maximum amount of audio; recordings are drawn at random until it is reached.
        seed: Seed of that draw, of noise and of reverberation.
        device: As ``run.device``.
        progress: Show a progress bar.

    Returns:
        For each layer, ``layer`` and the unit edit distance of each change: 0 if no unit changed, possibly above 1.

    Raises:
        InputError: A file cannot be read, or a layer has no codebook.
    """
    with needs_extra("train"):
        from tqdm import tqdm

        from spidr.data import speech_dataset
        from spidr.environment import choose_device

    codebooks = model.codebook_layers
    chosen = list(codebooks) if layers is None else chosen_layers(model, layers)
    if wrong := [layer for layer in chosen if layer not in codebooks]:
        raise InputError(f"layer {wrong[0]} has no codebook; layers {codebooks[0]} to {codebooks[-1]} have one")
    dataset = speech_dataset(manifest, normalize=False)
    lengths, most = dataset.lengths, max_minutes * 60 * SAMPLE_RATE
    shortest = 2 * receptive_field(model.conv_shapes)  # so that there is a frame at any tempo
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[(lengths[order] >= shortest) & (lengths[order] <= most)]
    rows = np.sort(order[np.cumsum(lengths[order]) <= most])
    if not len(rows):
        raise InputError(f"{manifest}: no recording is long enough, and as short as --max-minutes {max_minutes:g}")
    target, was_training = torch.device(choose_device(device)), model.training
    model = model.to(target).eval()

    def units_of(waveform: Tensor) -> list[NDArray[Any]]:
        outputs = model.get_codebooks(standardise(waveform.unsqueeze(0)).to(target))
        return [merged(cast("Tensor", outputs[layer - 1])[0].argmax(-1).cpu().numpy()) for layer in chosen]

    edits = {name: np.zeros(len(chosen)) for name in CHANGES}
    total = np.zeros(len(chosen))
    for row in tqdm(rows, unit="file", disable=not progress):
        waveform = dataset[int(row)]
        clean = units_of(waveform)
        total += [len(units) for units in clean]
        for name, change in CHANGES.items():
            changed = units_of(change(waveform, torch.Generator().manual_seed(seed)))
            edits[name] += [edit_distance(a, b) for a, b in zip(clean, changed, strict=True)]
    model.train(was_training)
    shares = {name: (edits[name] / total).tolist() for name in CHANGES}
    return [{"layer": layer, **{name: shares[name][k] for name in CHANGES}} for k, layer in enumerate(chosen)]

"""How a codebook is used and how phonetic its units are.

Perplexities follow section 4 of the SpidR paper (arXiv 2512.20308), the unit quality follows HuBERT (arXiv 2106.07447,
section 4.4): purities and the phone-normalised mutual information (PNMI) of the joint frequencies of phones and units.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spidr.tools.errors import InputError
from spidr.tools.lazy import names_from

if TYPE_CHECKING:
    from torch import Tensor

__getattr__ = names_from(__name__, "spidr.compat.training")  # what published packages also have here

Aligned = Mapping[str, tuple[Sequence[str], Sequence[int]]]
"""Name of a recording → its phones, one per alignment frame (10 ms), and its units, one per model frame (20 ms)."""


class UnitsQuality(NamedTuple):
    """Quality of discrete units against phone alignments. Only the cluster purity falls as units are added."""

    phone_purity: float
    """Accuracy of replacing every unit by its most frequent phone, in [0, 1]."""
    cluster_purity: float
    """Accuracy of replacing every phone by its most frequent unit, in [0, 1]."""
    pnmi: float
    """I(phone; unit) / H(phone): the share of the phones' entropy that the units explain, in [0, 1]."""
    codebook_perplexity: float
    """2 to the entropy in bits of the units, in [1, num_units]."""
    active_codewords: int
    """How many units occur."""
    bitrate: float
    """Bits per second, see :func:`bitrate`."""


def perplexity(y: Tensor, *, tokenwise: bool = False) -> Tensor:
    """2 to the entropy in bits of distributions over codewords, those of all processes if there is a process group.

    Args:
        y: One distribution per row ``(N, V)``: probabilities, or one-hot rows (then of any dtype).
        tokenwise: Give the mean of the rows' perplexities (how unsure a prediction is) instead of the perplexity of
            the mean row (how many codewords are in use).

    Returns:
        A 0-dim tensor between 1 and V, at least float32; NaN without rows.
    """
    import torch

    from spidr.models.codebook import all_reduce

    def perplexities(x: Tensor) -> Tensor:
        return torch.special.entr(x).sum(-1).exp()  # in nats: e to the nats is 2 to the bits

    y = y.to(torch.promote_types(y.dtype, torch.float32))
    values = perplexities(y).unsqueeze(1) if tokenwise else y
    total = torch.cat([values.sum(0), y.new_tensor([len(y)])])
    all_reduce(total)
    mean = total[:-1] / total[-1]
    return mean[0] if tokenwise else perplexities(mean)


def units_quality(
    data: Aligned,
    *,
    num_units: int,
    num_phones: int,
    frame_step: int = 20,
    alignment_step: int = 10,
    eps: float = 1e-10,
) -> UnitsQuality:
    """Purities, PNMI, perplexity and bitrate of units, from their joint frequencies with phones, in float64.

    Args:
        data: The phones and units of every recording.
        num_units: Size of the codebook; units are in [0, num_units).
        num_phones: The largest number of different phones, silence included.
        frame_step: Milliseconds per unit.
        alignment_step: Milliseconds per phone label.
        eps: Smallest entropy of the phones (bits) that PNMI divides by: with a single phone it is 0.

    Raises:
        InputError: As :func:`build_count_matrix`, and if ``frame_step`` is not a multiple of ``alignment_step``.
    """
    counts, _ = _count(data, num_units, num_phones, _repeat(frame_step, alignment_step))
    joint = counts / counts.sum()
    phone_entropy, unit_entropy = _entropy(joint.sum(1)), _entropy(joint.sum(0))
    return UnitsQuality(
        phone_purity=float(joint.max(0).sum()),
        cluster_purity=float(joint.max(1).sum()),
        pnmi=(phone_entropy + unit_entropy - _entropy(joint)) / max(phone_entropy, eps),
        codebook_perplexity=2**unit_entropy,
        active_codewords=int(np.count_nonzero(counts.any(0))),
        bitrate=bitrate(num_units=num_units, sequences=(units for _, units in data.values()), frame_step=frame_step),
    )


def build_count_matrix(
    data: Aligned, num_units: int, num_phones: int, repeat: int, max_length_diff: int = 2
) -> tuple[Tensor, list[str]]:
    """Count how often each phone and each unit fall on the same alignment frame.

    Args:
        data: The phones and units of every recording.
        num_units: Size of the codebook.
        num_phones: The largest number of different phones.
        repeat: Alignment frames per unit; every unit is repeated as often.
        max_length_diff: Largest accepted difference, in alignment frames, between the phones and the repeated units
            of a recording. The longer of the two is cut at its end.

    Returns:
        Counts ``(phones, num_units)``, int64, and the phones of the rows: those that occur, by falling frequency,
        equally frequent ones by name.

    Raises:
        InputError: No data at all, a recording whose phones and units differ too much in length, a unit outside
            [0, num_units), or more than ``num_phones`` phones. The message names the recording.
    """
    import torch

    counts, names = _count(data, num_units, num_phones, repeat, max_length_diff)
    return torch.from_numpy(counts), names


def _count(
    data: Aligned, num_units: int, num_phones: int, repeat: int, max_length_diff: int = 2
) -> tuple[NDArray[np.int64], list[str]]:
    """:func:`build_count_matrix` in numpy."""
    # Rows are numbered as the phones come, in one pass over millions of strings, and put in order afterwards.
    index: defaultdict[str, int] = defaultdict()
    index.default_factory = index.__len__
    counts = np.zeros(num_phones * num_units, dtype=np.int64)
    for name, (phones, units) in data.items():
        columns = _checked_units(name, units, num_units).repeat(repeat)
        if abs(len(phones) - len(columns)) > max_length_diff:
            raise InputError(
                f"{name}: {len(phones)} phones and {len(units)} units of {repeat} frames each differ by more than "
                f"{max_length_diff} frames; are these the alignments of the same recording?"
            )
        rows = np.fromiter(map(index.__getitem__, phones), np.int64, len(phones))
        if len(index) > num_phones:
            raise InputError(f"found more than {num_phones} phones, up to {name}: {' '.join(sorted(index))}")
        length = min(len(rows), len(columns))
        recording = np.bincount(rows[:length] * num_units + columns[:length])
        counts[: len(recording)] += recording
    names = sorted(index)
    counts = counts.reshape(num_phones, num_units)[[index[name] for name in names]]
    if not counts.any():
        raise InputError("no frame with both a phone and a unit")
    order = np.argsort(-counts.sum(1), kind="stable")
    return counts[order], [names[row] for row in order]


def proba_phone_code(
    data: Aligned, *, num_units: int, num_phones: int, only_active: bool, frame_step: int = 20, alignment_step: int = 10
) -> tuple[Tensor, list[str], Tensor]:
    """P(phone | unit), ordered for a heat map with a diagonal (figure 10 of the SpidR paper).

    Args:
        data: The phones and units of every recording.
        num_units: Size of the codebook.
        num_phones: The largest number of different phones.
        only_active: Leave out units that do not occur; otherwise they come last, with zeros.
        frame_step: Milliseconds per unit.
        alignment_step: Milliseconds per phone label.

    Returns:
        Probabilities ``(phones, units)``, float64, every active column summing to 1; the phones of the rows, by falling
        frequency; the units of the columns, int64 (units,), grouped by their most likely phone in the order of the
        rows, then by its falling probability.

    Raises:
        InputError: As :func:`units_quality`.
    """
    import torch

    counts, phones = _count(data, num_units, num_phones, _repeat(frame_step, alignment_step))
    probabilities = counts / counts.sum(0).clip(min=1)
    best, active = probabilities.max(0), counts.any(0)
    # lexsort: the last key is the first to sort by.
    order = np.lexsort((-best, probabilities.argmax(0), ~active))
    if only_active:
        order = order[: np.count_nonzero(active)]
    return torch.from_numpy(probabilities[:, order]), phones, torch.from_numpy(order)


def bitrate(*, num_units: int, sequences: Iterable[Sequence[int]] | None = None, frame_step: int = 20) -> float:
    """Bits per second of a stream of units, each costing ``log2(num_units)`` bits.

    Args:
        num_units: Size of the codebook.
        sequences: Units of every recording, one per frame: runs of the same unit are merged and count once. None: one
            unit per frame, the most there can be.
        frame_step: Milliseconds per frame.
    """
    units_per_second = 1000 / frame_step
    if sequences is not None:
        frames = units = 0
        for sequence in map(np.asarray, sequences):
            frames += len(sequence)
            units += bool(len(sequence)) + int(np.count_nonzero(sequence[1:] != sequence[:-1]))
        if not frames:
            raise InputError("the sequences hold no unit")
        units_per_second *= units / frames
    return math.log2(num_units) * units_per_second


def _repeat(frame_step: int, alignment_step: int) -> int:
    repeat, rest = divmod(frame_step, alignment_step)
    if rest or repeat < 1:
        raise InputError(f"frame_step = {frame_step} ms is not a multiple of alignment_step = {alignment_step} ms")
    return repeat


def _checked_units(name: str, units: Sequence[int], num_units: int) -> NDArray[np.int64]:
    array = np.asarray(units)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(f"{name}: units must be a list of integers, found {array.dtype} of shape {array.shape}")
    if array.min() < 0 or array.max() >= num_units:
        raise InputError(f"{name}: units from {array.min()} to {array.max()}, expected from 0 to {num_units - 1}")
    return array.astype(np.int64)


def _entropy(probabilities: NDArray[np.float64]) -> float:
    """In bits, over all elements."""
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log2(positive)).sum())

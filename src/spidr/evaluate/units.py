"""Compare units with phone alignments."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spidr.data.alignments import FRAME_STEP, SILENT_LABELS, TOLERANCE, Alignments, Skipped, fit, read_alignments
from spidr.data.names import match_names
from spidr.data.units import Units, read_record, read_units
from spidr.models.metrics import Aligned, UnitsQuality, units_quality
from spidr.tools.errors import InputError, some
from spidr.tools.files import expand
from spidr.tools.untrusted import check_memory

logger = logging.getLogger(__name__)

GUIDE = "evaluate.md#units-against-phones"


class Paired(NamedTuple):
    """Units and phones of the same recordings."""

    data: Aligned
    """Name → phones, one per 10 ms, and units."""
    num_units: int
    """Size of the codebook."""
    frame_step: int
    """Milliseconds per unit."""

    @property
    def quality(self) -> UnitsQuality:
        """The quality of the units. Raises InputError if a unit is outside the codebook."""
        num_phones = len(set().union(*(phones for phones, _ in self.data.values())))
        check_memory(24 * self.num_units * num_phones, f"counting {self.num_units} units")
        options = {"num_units": self.num_units, "num_phones": num_phones, "frame_step": self.frame_step}
        return units_quality(self.data, **options, alignment_step=FRAME_STEP)


def evaluate_units(units: str | Path, alignments: str | Path, **options: Any) -> UnitsQuality:
    """Measure the quality of the units in a file.

    Args:
        units: See :func:`spidr.data.units.read_units`.
        alignments: See :func:`spidr.data.alignments.read_alignments`.
        options: See :func:`pair`.

    Raises:
        InputError: A file cannot be read, a recording is not aligned, or does not fit its alignment.
    """
    return pair(units, alignments, **options).quality


def pair(
    units: str | Path,
    alignments: str | Path,
    *,
    num_units: int | None = None,
    frame_step: int | None = None,
    tier: str | None = None,
    silence: Collection[str] = SILENT_LABELS,
    tolerance: int = TOLERANCE,
    names: Sequence[str] | None = None,
    skip: bool = False,
) -> Paired:
    """Read units and the phones of the same recordings.

    Args:
        units: See :func:`spidr.data.units.read_units`.
        alignments: See :func:`spidr.data.alignments.read_alignments`.
        num_units: Size of the codebook, which the bitrate depends on. None: as recorded by ``spidr.extract``
            beside the units, else 256.
        frame_step: Milliseconds per unit. None: as recorded, else 20.
        tier: The tier of TextGrids.
        silence: Labels that mean silence.
        tolerance: Milliseconds by which an alignment may be too short or long before it is filled with silence or cut.
        names: The recordings of units without names.
        skip: Skip, with a warning, what cannot be read, is not aligned or does not fit its alignment.

    Raises:
        InputError: A file cannot be read, a recording is not aligned, or does not fit its alignment.
    """
    units, alignments = expand(units), expand(alignments)
    made = read_record(units)
    assumed = not (num_units or made.get("num_units"))
    num_units = _decide("num_units", num_units, made.get("num_units"), 256, units)
    frame_step = _decide("frame_step", frame_step, _recorded_step(units, made), 20, units)
    skipped: Skipped = {}
    sequences = read_units(units, names=names)
    aligned = read_alignments(alignments, tier, silence=silence, skipped=skipped if skip else None)
    matched = {name: aligned[found] for name, found in match_names(aligned, sequences).items()}
    gone = sorted(sequences.keys() - matched.keys())
    if gone and not skip:
        of = f"{len(gone)} of the {len(sequences)} recordings of {units}"
        raise InputError(f"{alignments}: {of} are not aligned, such as {some(gone, 3)}", guide=GUIDE)
    skipped |= dict.fromkeys(gone, "not aligned")
    data = _fitted(sequences, matched, frame_step, tolerance, skipped)
    reasons = some([f"{name}: {reason}" for name, reason in skipped.items()], separator="\n")
    if skipped and not skip:
        count = f"{len(skipped)} recordings do not fit (--tolerance, --on-error skip)"
        raise InputError(f"{alignments}: {count}:\n{reasons}", guide=GUIDE)
    if skipped:
        logger.warning("left out: %s", reasons)
    if not data:
        raise InputError(f"{alignments}: fits no recording of {units}", guide=GUIDE)
    top = max(max(sequence.tolist(), default=0) for sequence in sequences.values())
    if assumed and top < num_units / 2:
        logger.warning("%s: a codebook of %d is assumed, but no unit is above %d: --num-units?", units, num_units, top)
    return Paired(data, num_units, frame_step)


def with_alignments(units: str | Path, alignments: str | Path) -> list[tuple[Path, Path]]:
    """Pair units with their alignments; of a folder of DiscoPhon's ``units-LANGUAGE-SPLIT.jsonl``, each file.

    Its alignments are ``alignment-LANGUAGE-SPLIT``, with any suffix, in a folder or in ``alignment`` there.
    """
    units, alignments = expand(units), expand(alignments)
    pairs = []
    for file in sorted(units.glob("units-*-*.jsonl")):
        name = file.stem.replace("units-", "alignment-", 1)
        folders, names = (alignments, alignments / "alignment"), (name, f"{name}.*")
        found = [path for folder in folders for pattern in names for path in sorted(folder.glob(pattern))]
        if not found:
            raise InputError(f"{alignments}: no {name}.txt or the like for {file}")
        pairs.append((file, found[0]))
    return pairs or [(units, alignments)]


def _fitted(units: Units, aligned: Alignments, frame_step: int, tolerance: int, skipped: Skipped) -> Aligned:
    """Make alignments as long as units; add those that differ too much to ``skipped``."""
    data: dict[str, Any] = {}
    changed = []
    for name, phones in aligned.items():
        wanted = len(units[name]) * frame_step // FRAME_STEP
        if (fitting := fit(phones, wanted, tolerance)) is None:
            lengths = f"{len(phones) * FRAME_STEP:,} ms, the units {len(units[name]) * frame_step:,} ms"
            skipped[name] = f"the alignment has {lengths}; are they of the same recording?"
            continue
        if len(fitting) != len(phones):
            changed.append(abs(len(fitting) - len(phones)))
        data[name] = (fitting, units[name])
    if changed:
        most = max(changed) * FRAME_STEP
        logger.warning("%d alignments were filled with silence or cut, by at most %d ms", len(changed), most)
    return data


def _recorded_step(units: Path, made: dict[str, Any]) -> int | None:
    seconds = made.get("frame_seconds")
    if not isinstance(seconds, float) or not 0 < seconds < 1:
        return None
    step = round(seconds * 1000)
    if abs(step - seconds * 1000) > 1e-6:
        raise InputError(f"{units}: units of {seconds * 1000:g} ms, expected a multiple of {FRAME_STEP} ms")
    return step


def _decide(name: str, given: int | None, recorded: Any, default: int, source: str | Path) -> int:
    recorded = recorded if isinstance(recorded, int) and recorded > 0 else None
    if given is None:
        return recorded or default
    if given < 1:
        raise InputError(f"{name} must be at least 1, not {given}")
    if recorded not in (None, given):
        raise InputError(f"{source}: was made with {name} = {recorded}, not {given}")
    return given

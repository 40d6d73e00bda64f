"""DiscoPhon's metrics (arXiv 2603.18612), by the package ``discophon``."""

from typing import Any, NamedTuple

from spidr.data.alignments import FRAME_STEP
from spidr.models.metrics import Aligned
from spidr.tools.errors import InputError, first_line
from spidr.tools.lazy import needs_extra


class Discovery(NamedTuple):
    """How well units that each stand for one phone transcribe the phones."""

    per_many_to_one: float
    """Phone error rate if each unit stands for its most frequent phone."""
    per_one_to_one: float
    """Phone error rate if no two units stand for the same phone, and the remaining ones for none."""
    boundary_f1: float
    """F1 of the phones' boundaries within 20 ms, with the first of these maps."""
    r_value: float
    """R-value of the same boundaries (Räsänen et al., 2009), which over-segmentation does not improve."""


def discovery(data: Aligned, num_units: int, frame_step: int) -> Discovery:
    """Compute DiscoPhon's metrics of phones, one per 10 ms, and units of ``frame_step`` ms.

    Raises:
        InputError: discophon is not installed, or a recording has no units or phones.
    """
    with needs_extra("discophon", " (Python 3.12 or newer)"):
        from discophon.evaluate import cooccurrence_matrix, phone_assignments, phone_error_rate, phone_segmentation
    phones = {name: list(labels) for name, (labels, _) in data.items()}
    units = {name: [int(unit) for unit in sequence] for name, (_, sequence) in data.items()}
    steps = {"step_units": frame_step, "step_phones": FRAME_STEP}
    num_phones = len(set().union(*phones.values()))

    def assigned(kind: str, of_units: int, of_phones: int) -> Any:
        matrix = cooccurrence_matrix(units, phones, n_units=of_units, n_phonemes=of_phones - 1, **steps)
        return phone_assignments(units, matrix, kind=kind)

    try:
        many = assigned("many-to-one", num_units, max(num_phones, 2))
        square = max(num_phones, num_units, 2)  # padded with phones or units that do not occur
        one = assigned("one-to-one", square, square)
        boundaries = phone_segmentation(many, phones, **steps)
        return Discovery(phone_error_rate(many, phones), phone_error_rate(one, phones), boundaries.f1, boundaries.r_val)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"DiscoPhon's metrics: {first_line(error)}") from None

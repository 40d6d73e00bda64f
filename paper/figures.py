"""Draw the figures of the SpidR paper, as PDF and PNG, one column (3.3 in) wide.

    python paper/figures.py [--only 2,7,…] [--output DIR]
                            [--features DIR …] [--units FILE] [--alignments FILE]

Figures 2 to 7 and 11 to 16 come from the measured values in paper/results and from the package itself (schedules,
masks), and take twenty seconds. Figures 8 and 9 (t-SNE of phone embeddings) need features and alignments, and 10
(phones given units) needs units and alignments (LibriSpeech dev-clean in the paper): a minute for 3,000 phones.
Without these files, the script skips the figures and says what is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from spidr.tools.command import Parser, command, write_result
from spidr.tools.errors import InputError
from spidr.tools.lazy import command_needs

with command_needs("paper", __name__):
    import from_package
    import from_results
    from matplotlib.figure import Figure
    from style import save

ALONE: dict[int, Callable[[], Figure]] = {
    2: from_results.perplexity_while_training,
    3: from_results.spoken_lm_by_hours,
    4: from_results.pretraining_time,
    5: from_package.schedules,
    6: from_package.masks,
    7: from_results.continuous_by_layer,
    11: from_results.discrete_by_layer,
    12: from_results.spoken_lm_by_layer,
    13: from_results.spoken_lm_against_features,
    14: from_results.spoken_lm_against_units,
    15: from_results.spoken_lm_by_hours_all,
    16: from_results.spoken_lm_against_superb,
}
NEEDS = {8: ("features", "alignments"), 9: ("features", "alignments"), 10: ("units", "alignments")}
NUMBERS = sorted([*ALONE, *NEEDS])


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=_numbers, help="numbers of figures, such as 2,7,11 (default: all)")
    parser.add_argument("--output", type=Path, default=Path("runs/paper/figures"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--features",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="8, 9: from paper/extract_features.py (default: skip them)",
    )
    parser.add_argument("--segments", type=int, default=3000, help="8, 9: phones to draw (default: %(default)s)")
    parser.add_argument(
        "--units", type=Path, metavar="FILE", help="10: from python -m spidr.extract units (default: skip it)"
    )
    parser.add_argument("--num-units", type=int, default=256, help="10: size of the codebook (default: %(default)s)")
    parser.add_argument(
        "--alignments", type=Path, metavar="FILE", help="8, 9, 10: phones in JSON lines (default: skip them)"
    )
    args = parser.parse_args(argv)
    for number in args.only or NUMBERS:
        missing = [f"--{name}" for name in NEEDS.get(number, ()) if getattr(args, name) is None]
        if missing and args.only:
            raise InputError(f"figure {number} needs {' and '.join(missing)} (see --help)")
        if missing:
            write_result(f"figure {number}: skipped, it needs {' and '.join(missing)}\n")
    for number, figure in _draw(args):
        for path in save(figure, args.output, f"figure{number}"):
            write_result(f"{path}\n")


def _draw(args: argparse.Namespace) -> Iterator[tuple[int, Figure]]:
    given = {name for name in ("features", "units", "alignments") if getattr(args, name) is not None}
    wanted = [number for number in args.only or NUMBERS if given.issuperset(NEEDS.get(number, ()))]
    for number in wanted:
        if number in ALONE:
            yield number, ALONE[number]()
    if {8, 9, 10} & set(wanted):
        with command_needs("paper", __name__):
            import from_corpus

        if 10 in wanted:
            yield 10, from_corpus.phones_given_units(args.units, args.alignments, args.num_units)
        if {8, 9} & set(wanted):
            both = from_corpus.embeddings(args.features, args.alignments, args.segments)
            yield from ((number, both[number - 8]) for number in (8, 9) if number in wanted)


def _numbers(text: str) -> list[int]:
    numbers = [int(part) if part.strip().isdigit() else -1 for part in text.split(",")]
    if not set(numbers) <= set(NUMBERS):
        raise argparse.ArgumentTypeError(f"{text!r}: figures are {', '.join(map(str, NUMBERS))}")
    return numbers


if __name__ == "__main__":
    sys.exit(main())

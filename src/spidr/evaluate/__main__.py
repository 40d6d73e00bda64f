"""``python -m spidr.evaluate units|abx|model|robustness``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from spidr.tools.command import Parser, add_device, command, write_result

Row = dict[str, Any]

COLUMNS = {
    "pnmi": ("PNMI", ".4f"),
    "phone_purity": ("phone purity", ".4f"),
    "cluster_purity": ("cluster purity", ".4f"),
    "codebook_perplexity": ("perplexity", ".2f"),
    "active_codewords": ("active", "d"),
    "bitrate": ("bit/s", ".2f"),
    "per_many_to_one": ("PER n:1", ".2%"),
    "per_one_to_one": ("PER 1:1", ".2%"),
    "boundary_f1": ("boundary F1", ".4f"),
    "r_value": ("R-value", ".4f"),
    "abx_within": ("ABX within", ".2%"),
    "abx_across": ("ABX across", ".2%"),
    "units_abx_within": ("units ABX within", ".2%"),
    "units_abx_across": ("units ABX across", ".2%"),
    "within": ("within speaker", ".2%"),
    "across": ("across speakers", ".2%"),
    "items": ("items", "d"),
    "too_short": ("too short", "d"),
}
"""What is measured, its heading, and how its numbers are written."""


def format_table(rows: Sequence[Row], first: str) -> str:
    """A table in Markdown; a value that does not exist is empty."""
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    names += [name for name in rows[0] if name not in COLUMNS and name != first]
    lines = [[first, *(COLUMNS.get(name, (name,))[0] for name in names)]]
    for row in rows:
        values = ((row.get(name), COLUMNS.get(name, ("", ".2%"))[1]) for name in names)
        lines.append([str(row[first]), *("" if value is None else format(value, form) for value, form in values)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = (
        " | ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
    return "".join(f"| {line} |\n" for line in text)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = _parser().parse_args(argv)
    rows: list[Row] = args.run(args)
    if args.json:
        write_result("".join(json.dumps(row) + "\n" for row in rows))
    else:
        write_result(format_table(rows, next(iter(rows[0]))))


def _silence(args: argparse.Namespace) -> dict[str, Any]:
    return {"tier": args.tier} | ({} if args.silence is None else {"silence": args.silence.split(",")})


def _units(args: argparse.Namespace) -> list[Row]:
    from spidr.evaluate.units import evaluate_all

    return evaluate_all(
        args.units,
        args.alignments,
        discophon=args.discophon,
        manifest=args.manifest,
        num_units=args.num_units,
        frame_step=args.frame_step,
        tolerance=args.tolerance,
        skip=args.on_error == "skip",
        **_silence(args),
    )


def _abx(args: argparse.Namespace) -> list[Row]:
    from spidr.evaluate.abx import Scorer, evaluate_abx, read_items

    scorer = Scorer(
        read_items(args.item),
        frame_rate=args.frame_rate,
        max_size_group=args.max_size_group or None,
        max_x_across=args.max_x_across or None,
        context=args.context,
    )
    return [{"features": path, **evaluate_abx(path, scorer, args.distance)._asdict()} for path in args.features]


def _model(args: argparse.Namespace) -> list[Row]:
    from spidr.evaluate.abx import read_items
    from spidr.evaluate.model import evaluate_model
    from spidr.models.hub import load_encoder

    return evaluate_model(
        load_encoder(args.model, args.model_type),
        args.manifest,
        args.alignments,
        items=read_items(args.item) if args.item else None,
        layers=args.layers,
        device=args.device,
        max_batch_length=args.max_batch_length,
        progress=sys.stderr.isatty(),
        **_silence(args),
    )


def _robustness(args: argparse.Namespace) -> list[Row]:
    from spidr.evaluate.robustness import evaluate_robustness
    from spidr.models.hub import load_encoder

    return evaluate_robustness(
        load_encoder(args.model, args.model_type),
        args.manifest,
        layers=args.layers,
        max_minutes=args.max_minutes,
        seed=args.seed,
        device=args.device,
        progress=sys.stderr.isatty(),
    )


def _layers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _frame_rate(text: str) -> Fraction:
    """Such as 50, 49.5 or 100/3."""
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6}|/[1-9]\d{0,5})?", text, re.ASCII) or not Fraction(text):
        raise ValueError
    return Fraction(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m spidr.evaluate",
        description="How good units, features and models are.",
        example="python -m spidr.evaluate units units.jsonl alignments.jsonl",
    )
    commands = parser.add_subparsers(required=True, metavar="units|abx|model|robustness")

    def add(name: str, run: Any, text: str, example: str) -> argparse.ArgumentParser:
        example = f"python -m spidr.evaluate {name} {example}"
        sub = commands.add_parser(name, help=text, description=text, example=example)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="JSON lines instead of a table")
        return sub

    units = add(
        "units",
        _units,
        "Units against phone alignments: PNMI, purities, perplexity, bitrate.",
        "dev-units.jsonl dev-alignments.jsonl",
    )
    units.add_argument(
        "units", nargs="+", help="JSON lines, Parquet, NAME|UNITS, .km, or folders of .npy or units-*-*.jsonl"
    )
    units.add_argument("--num-units", type=int, metavar="N", help="size of the codebook (default: as recorded, or 256)")
    units.add_argument("--frame-step", type=int, metavar="MS", help="length of a unit (default: as recorded, or 20)")
    units.add_argument("--manifest", help="whose units they are where lines have no names (default: NAME.tsv)")
    units.add_argument(
        "--tolerance",
        type=int,
        default=100,
        metavar="MS",
        help="by how much alignments may be too short or long: then filled with silence, or cut (default: 100)",
    )
    units.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="what to do with recordings that are not aligned or do not fit (default: raise)",
    )
    units.add_argument(
        "--discophon", action="store_true", help="DiscoPhon's metrics too: phone error rates, boundaries (default: no)"
    )
    abx = add(
        "abx",
        _abx,
        "ABX error rates, within and across speakers, of one or several representations.",
        "dev-features dev-units.jsonl phoneme.item",
    )
    abx.add_argument("features", nargs="+", help="folders of .npy or .pt files (T, D), or units in any form")
    abx.add_argument("item", help="ABX item file")
    abx.add_argument(
        "--frame-rate", type=_frame_rate, default=Fraction(50), metavar="HZ", help="frames per second (default: 50)"
    )
    abx.add_argument(
        "--distance",
        choices=("angular", "euclidean", "kl_symmetric", "identical"),
        help="between two frames (default: angular for features, identical for units)",
    )
    abx.add_argument(
        "--context",
        choices=("within", "any"),
        default="within",
        help="neighbours of A, B and X: the same, or any (default: within)",
    )
    abx.add_argument(
        "--max-size-group",
        type=int,
        default=10,
        metavar="N",
        help="most A, B and X in a cell; 0: all (default: 10)",
    )
    abx.add_argument("--max-x-across", type=int, default=5, metavar="N", help="most speakers of X; 0: all (default: 5)")
    model = add(
        "model",
        _model,
        "Every layer and codebook of a model, in one pass over the audio.",
        "spidr_base dev.csv dev-alignments.jsonl",
    )
    robustness = add(
        "robustness",
        _robustness,
        "How much of the units changes when the sound does: louder, noisier, faster, …",
        "spidr_base dev.csv --layers 5,6,7",
    )
    for sub in (model, robustness):
        sub.add_argument("model", metavar="MODEL", help="a published model, or a checkpoint")
        sub.add_argument("manifest", help="the recordings")
        sub.add_argument("--layers", type=_layers, metavar="N,…", help="counted from 1, such as 5,6,7 (default: all)")
        sub.add_argument(
            "--model-type", choices=("spidr", "dinosr"), help="of a checkpoint that does not tell (default: it tells)"
        )
        add_device(sub)
    model.add_argument("--item", help="ABX item file: ABX of every layer's features and units too (default: no ABX)")
    model.add_argument(
        "--max-batch-length",
        type=int,
        default=3_800_000,
        metavar="SAMPLES",
        help="samples of a batch with its padding, 16,000 a second (default: 3,800,000)",
    )
    robustness.add_argument(
        "--max-minutes", type=float, default=10.0, metavar="MINUTES", help="audio to take at most (default: 10)"
    )
    robustness.add_argument("--seed", type=int, default=0, help="of noise and reverberation (default: 0)")
    for sub in (units, model):
        sub.add_argument("alignments", help="JSON lines, a TextGrid, or a folder of TextGrids")
        sub.add_argument("--tier", help="tier of the phones in TextGrids (default: phones)")
        sub.add_argument("--silence", metavar="LABEL,…", help="labels that are silence (default: sil, sp, spn, pau, …)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

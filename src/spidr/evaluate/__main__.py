"""``python -m spidr.evaluate units|abx|model|robustness``."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from spidr.tools.command import DEVICE, Parser, command, write_result
from spidr.tools.lazy import needs_extra

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
"""A measure: its name, heading and number format."""


def format_table(rows: Sequence[Row]) -> str:
    """A Markdown table whose first column names the rows; missing values are empty."""
    first, *others = rows[0]
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    names += [name for name in others if name not in COLUMNS]
    lines = [[first, *(COLUMNS.get(name, (name,))[0] for name in names)]]
    for row in rows:
        values = ((row.get(name), COLUMNS.get(name, ("", ".2%"))[1]) for name in names)
        lines.append([str(row[first]), *("" if value is None else format(value, form) for value, form in values)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = ""
    for name, *cells in lines:
        padded = [name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True))]
        text += f"| {' | '.join(padded)} |\n"
    return text


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = vars(_parser().parse_args(argv))
    run, as_json = options.pop("run"), options.pop("json")
    rows: list[Row] = run(**options)
    write_result("".join(json.dumps(row) + "\n" for row in rows) if as_json else format_table(rows))


# Each subcommand's function takes arguments named as in the parser.


def _units(
    units: list[str], alignments: str, *, on_error: str, discophon: bool, manifest: str | None, **options: Any
) -> list[Row]:
    from spidr.evaluate.quality import discovery
    from spidr.evaluate.units import pair, with_alignments

    if manifest is not None:
        with needs_extra("train"):
            from spidr.data import read_manifest
        options["names"] = read_manifest(manifest)["fileid"].to_list()
    table = []
    files = [both for path in units for both in with_alignments(path, alignments)]
    for number, (path, aligned) in enumerate(files, start=1):
        if len(files) > 1:
            sys.stderr.write(f"{number} of {len(files)}: {path}\n")
        paired = pair(path, aligned, skip=on_error == "skip", **options)
        metrics = paired.quality._asdict() | (discovery(*paired)._asdict() if discophon else {})
        table.append({"units": str(path), **metrics})
    return table


def _abx(features: list[str], item: str, *, distance: Any, **options: Any) -> list[Row]:
    from spidr.evaluate.abx import Scorer, evaluate_abx, read_items

    scorer = Scorer(read_items(item), **options)
    return [{"features": path, **evaluate_abx(path, scorer, distance)._asdict()} for path in features]


def _model(model: str, *, model_type: Any, item: str | None, **options: Any) -> list[Row]:
    from spidr.evaluate.abx import read_items
    from spidr.evaluate.model import evaluate_model
    from spidr.models.hub import load_encoder

    items = read_items(item) if item else None
    return evaluate_model(load_encoder(model, model_type), items=items, progress=sys.stderr.isatty(), **options)


def _robustness(model: str, *, model_type: Any, **options: Any) -> list[Row]:
    from spidr.evaluate.robustness import evaluate_robustness
    from spidr.models.hub import load_encoder

    return evaluate_robustness(load_encoder(model, model_type), progress=sys.stderr.isatty(), **options)


def labels(text: str) -> list[str]:
    """Parse a list such as sil,sp."""
    return text.split(",")


def layers(text: str) -> list[int]:
    """Parse a list such as 5,6,7."""
    return list(map(int, labels(text)))


def number(text: str) -> int | None:
    """Parse a limit; 0 means none."""
    return int(text) or None


def frame_rate(text: str) -> Fraction:
    """Parse a number such as 50, 49.5 or 100/3."""
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6}|/[1-9]\d{0,5})?", text, re.ASCII) or not Fraction(text):
        raise ValueError
    return Fraction(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m spidr.evaluate",
        description="Measure the quality of units, features and models.",
        example="python -m spidr.evaluate units units.jsonl alignments.jsonl",
    )
    commands = parser.add_subparsers(required=True, metavar="units|abx|model|robustness")

    def add(name: str, run: Any, text: str, example: str) -> Any:
        example = f"python -m spidr.evaluate {name} {example}"
        sub = commands.add_parser(name, help=text, description=text, example=example)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="JSON lines instead of a table")
        return sub.add_argument

    text = "Units against phone alignments: PNMI, purities, perplexity, bitrate."
    units = add("units", _units, text, "dev-units.jsonl dev-alignments.jsonl")
    units("units", nargs="+", help="JSON lines, Parquet, NAME|UNITS, .km, or folders of .npy or units-*-*.jsonl")
    units("--num-units", type=int, metavar="N", help="size of the codebook (default: as recorded, or 256)")
    units("--frame-step", type=int, metavar="MS", help="length of a unit (default: as recorded, or 20)")
    units("--manifest", help="manifest of the recordings, if lines have no names (default: NAME.tsv)")
    text = "how much too short or long alignments may be before they are filled or cut (default: 100)"
    units("--tolerance", type=int, default=100, metavar="MS", help=text)
    text = "what to do with recordings that are not aligned or do not fit (default: raise)"
    units("--on-error", choices=("raise", "skip"), default="raise", help=text)
    units("--discophon", action="store_true", help="add DiscoPhon's phone error rates and boundaries (default: no)")

    text = "ABX error rates, within and across speakers, of one or several representations."
    abx = add("abx", _abx, text, "dev-features dev-units.jsonl phoneme.item")
    abx("features", nargs="+", help="folders of .npy or .pt files (T, D), or units in any form")
    abx("item", help="ABX item file")
    abx("--frame-rate", type=frame_rate, default=Fraction(50), metavar="HZ", help="frames per second (default: 50)")
    text = "distance of two frames (default: angular for features, identical for units)"
    abx("--distance", choices=("angular", "euclidean", "kl_symmetric", "identical"), help=text)
    text = "maximum number of A, B and X in a cell; 0: all (default: 10)"
    abx("--max-size-group", type=number, default=10, metavar="N", help=text)
    abx("--max-x-across", type=number, default=5, metavar="N", help="maximum speakers of X; 0: all (default: 5)")

    text = "Every layer and codebook of a model, in one pass over the audio."
    model = add("model", _model, text, "spidr_base dev.csv dev-alignments.jsonl")
    text = "How much the units change when the sound does: quieter, noisier, faster, …"
    robustness = add("robustness", _robustness, text, "spidr_base dev.csv --layers 5,6,7")
    for of_model in (model, robustness):
        of_model("model", metavar="MODEL", help="a published model, or a checkpoint")
        of_model("manifest", help="the recordings")
        of_model("--layers", type=layers, metavar="N,…", help="counted from 1, such as 5,6,7 (default: all)")
        text = "for checkpoints without config.json (default: detected)"
        of_model("--model-type", choices=("spidr", "dinosr"), help=text)
        of_model("--device", **DEVICE)
    model("--item", help="ABX item file, to add ABX of every layer's features and units (default: no ABX)")
    text = "samples in a batch, padding included, 16,000 per second (default: 3,800,000)"
    model("--max-batch-length", type=int, default=3_800_000, metavar="SAMPLES", help=text)
    robustness("--max-minutes", type=float, default=10.0, metavar="MIN", help="maximum amount of audio (default: 10)")
    robustness("--seed", type=int, default=0, help="seed of noise and reverberation (default: 0)")

    for aligned in (units, model):
        aligned("alignments", help="JSON lines, a TextGrid, or a folder of TextGrids")
        aligned("--tier", help="tier of the phones in TextGrids (default: phones)")
        text = "labels of silence (default: sil, sp, spn, pau, …)"
        aligned("--silence", type=labels, default=argparse.SUPPRESS, metavar="LABEL,…", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())

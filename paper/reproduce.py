"""Measure a model as the SpidR paper does, and compare with the published values.

    python paper/reproduce.py CHECKPOINT LIBRISPEECH [--layer 6] [--alignments FILE] [--items SET=FILE …] [--output DIR]

CHECKPOINT is a file or a published model (spidr_base, dinosr_base_reproduced, dinosr_base_original). LIBRISPEECH is the
folder with dev-clean, dev-other or both, as downloaded. The script writes manifests, features (layer6/) and units
(layer6.jsonl) to runs/reproduced/MODEL, measures unit quality (with phone alignments) and ABX errors of features and
units (with item files, by fastabx), and ends with a table of published and reproduced values and their difference
(table.md, results.csv; paper/tables.py --reproduced reads the latter).

It takes as long as the model needs to encode 10.7 hours of speech twice, plus minutes for ABX. The base model's
features take 6 GB. Interrupt it at any time and rerun it to resume. Values compare with the published ones only if
alignments and items are the paper's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spidr.tools.command import DEVICE, Parser, command, write_result
from spidr.tools.errors import InputError
from spidr.tools.files import atomic_write
from spidr.tools.lazy import command_needs
from spidr.tools.threads import set_up_threads

if __name__ == "__main__":
    set_up_threads()  # before torch is loaded
with command_needs("paper", __name__):
    import polars as pl
    from published import KEYS, METRICS, REPRESENTATIONS, SCHEMA, results

    from spidr.data.alignments import read_alignments
    from spidr.data.names import match_names
    from spidr.data.units import read_units
    from spidr.data.write_manifest import write_manifest
    from spidr.evaluate import evaluate_abx
    from spidr.evaluate.abx import Scorer, read_items
    from spidr.extract import Options, extract_features, extract_units
    from spidr.models import DinoSR, SpidR
    from spidr.models.hub import load_encoder
    from spidr.models.metrics import units_quality

SETS = ("dev-clean", "dev-other")
SAME_AS = {
    "spidr_base": "spidr",
    "dinosr_base_reproduced": "dinosr_reproduced",
    "dinosr_base_original": "dinosr_original",
}
PUBLISHED = sorted(SAME_AS.values())

Row = dict[str, str | int | float | None]


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    reproduce(_parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint or the name of a published model")
    parser.add_argument("librispeech", type=Path, help="folder with dev-clean, dev-other")
    parser.add_argument("--layer", type=int, help="counted from 1 (default: 6 for SpidR, 5 for DinoSR)")
    parser.add_argument(
        "--alignments",
        type=Path,
        help="phones of all recordings: JSON lines, or TextGrids in a folder (default: no unit quality)",
    )
    parser.add_argument(
        "--items",
        type=_set_and_file,
        nargs="+",
        default=[],
        metavar="SET=FILE",
        help="ABX item files (default: no ABX)",
    )
    parser.add_argument("--output", type=Path, help="folder (default: runs/reproduced/MODEL)")
    parser.add_argument("--compare", choices=PUBLISHED, help="published model to compare with (default: by model type)")
    parser.add_argument("--device", **DEVICE)
    return parser


def reproduce(args: argparse.Namespace) -> pl.DataFrame:
    """Run the missing steps, print and write the table, and return the reproduced values."""
    sets = [name for name in SETS if (args.librispeech / name).is_dir()]
    if not sets:
        raise InputError(f"{args.librispeech}: neither {' nor '.join(SETS)} in this folder; is it LibriSpeech's?")
    items: dict[str, Path] = dict(args.items)
    if unknown := sorted(items.keys() - set(sets)):
        raise InputError(f"--items {unknown[0]}=…: there is no {unknown[0]} in {args.librispeech}.")
    for path in filter(None, [args.alignments, *items.values()]):
        if not path.exists():
            raise InputError(f"{path}: does not exist.")
    model = load_encoder(args.checkpoint)
    layer = args.layer or model.best_layer
    name = args.compare or SAME_AS.get(args.checkpoint, "spidr" if isinstance(model, SpidR) else "dinosr_reproduced")
    output = args.output or Path("runs/reproduced") / Path(args.checkpoint).stem
    output.mkdir(parents=True, exist_ok=True)
    units = _encode(args, sets, model, layer, output)

    measured = _Measured(output / "measured")
    missing = [f"{name}: not in {args.librispeech}" for name in SETS if name not in sets]
    rows: list[Row] = []
    common = {"model": name, "layer": layer, "num_units": None, "lm_hours": None, "speaker": None}
    discrete = {**common, "representation": "codebooks", "num_units": model.cfg.codebook_size}
    if units is None:
        missing.append(f"units: layer {layer} has no codebook")
    elif args.alignments is None:
        missing.append("unit quality: needs --alignments")
    else:
        quality = measured("unit quality", [units, args.alignments], lambda: _quality(units, args.alignments, model))
        unaligned = int(quality.pop("unaligned"))
        if unaligned:
            missing.append(f"unit quality: {unaligned} recordings without alignment")
        dataset = "+".join(sets)
        rows += [
            {**discrete, "experiment": "unit_quality", "dataset": dataset, "metric": metric, "value": value}
            for metric, value in quality.items()
        ]
    sources = [({**common, "representation": "continuous"}, output / f"layer{layer}")]
    sources += [(discrete, units)] if units is not None else []
    for dataset in sets:
        if dataset not in items:
            missing.append(f"ABX on {dataset}: needs --items {dataset}=FILE")
            continue
        for kind, source in sources:
            about = [source / "extract.json" if source.is_dir() else source, items[dataset]]
            label = f"ABX of {REPRESENTATIONS[str(kind['representation'])]} on {dataset}"
            errors = measured(label, about, lambda source=source, dataset=dataset: _abx(source, items[dataset]))
            rows += [
                {**kind, "experiment": "abx", "dataset": dataset, "speaker": speaker, "metric": "abx", "value": value}
                for speaker, value in errors.items()
            ]
    table = pl.DataFrame(rows, schema=SCHEMA)
    with atomic_write(output / "results.csv") as file:
        table.write_csv(file)
    text = comparison(table) if rows else ""
    text += "".join(f"- skipped, {reason}\n" for reason in missing)
    with atomic_write(output / "table.md") as file:
        file.write(text.encode())
    write_result(text)
    return table


def _encode(args: argparse.Namespace, sets: Sequence[str], model: DinoSR, layer: int, output: Path) -> Path | None:
    """Write manifests, features (``layerN/``) and units (``layerN.jsonl``). Returns the units' path, if any."""
    manifests = [output / f"{name}.csv" for name in sets]
    for name, manifest in zip(sets, manifests, strict=True):
        write_manifest(args.librispeech / name, manifest, ".flac")
    options = Options(device=args.device)
    extract_features(manifests, output / f"layer{layer}", model=args.checkpoint, layer=layer, options=options)
    if layer not in model.codebook_layers:
        return None
    units = output / f"layer{layer}.jsonl"
    extract_units(manifests, units, model=args.checkpoint, layer=layer, options=options)
    return units


def _quality(units: Path, alignments: Path, model: DinoSR) -> dict[str, float]:
    """Unit quality over all aligned recordings, and the number of unaligned ones."""
    sequences = read_units(units)
    phones = read_alignments(alignments)
    data: Any = {name: (phones[found], sequences[name]) for name, found in match_names(phones, sequences).items()}
    inventory = {phone for row, _ in data.values() for phone in row}
    quality = units_quality(data, num_units=model.cfg.codebook_size, num_phones=len(inventory))
    return {**quality._asdict(), "unaligned": len(sequences) - len(data)}


def _abx(source: Path, items: Path) -> dict[str, float]:
    """ABX errors in %, for the conditions that the items cover."""
    errors = evaluate_abx(source, Scorer(read_items(items)))._asdict()
    return {name: 100 * errors[name] for name in ("within", "across") if errors[name] is not None}


class _Measured:
    """Measurements kept in a folder and repeated only if their input files have changed."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder

    def __call__(
        self, label: str, inputs: Sequence[Path], measure: Callable[[], Mapping[str, float]]
    ) -> dict[str, float]:
        path = self.folder / f"{'-'.join(label.split())}.json"
        key = [str(file) for file in inputs] + [_fingerprint(file) for file in inputs]
        if path.exists():
            known = json.loads(path.read_text("utf-8"))
            if known["inputs"] == key:
                return dict(known["values"])
        write_result(f"measuring {label}\n")
        values = dict(measure())
        with atomic_write(path) as file:
            file.write(json.dumps({"inputs": key, "values": values}, indent=2).encode())
        return values


def _fingerprint(path: Path) -> str:
    """Hash a file's content, or the names, sizes and times of a folder's files."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(path.rglob("*"))]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def comparison(reproduced: pl.DataFrame) -> str:
    """A Markdown table: measure, published, reproduced, difference."""
    published = pl.concat([results("abx"), results("unit_quality")]).rename({"value": "published"})
    rows = reproduced.join(published, on=KEYS, how="left", nulls_equal=True, maintain_order="left")
    lines = [["Measure", "Published", "Reproduced", "Difference"]]
    for row in rows.iter_rows(named=True):
        what = [METRICS[row["metric"]], REPRESENTATIONS[row["representation"]], f"layer {row['layer']}", row["dataset"]]
        digits = {"abx": 2, "bitrate": 1, "codebook_perplexity": 1, "active_codewords": 0}.get(row["metric"], 4)
        values = [f"{row['value']:.{digits}f}"]
        if row["published"] is not None:
            difference = f"{row['value'] - row['published']:+.{digits}f}"
            values = [f"{row['published']:.{digits}f}", *values, difference]
        else:
            values = ["", *values, ""]
        lines.append([", ".join(filter(None, [*what, row["speaker"]])), *values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = (
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in lines
    )
    return "".join(f"| {' | '.join(row)} |\n" for row in aligned)


def _set_and_file(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not path or name not in SETS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {'=FILE or '.join(SETS)}=FILE")
    return name, Path(path)


if __name__ == "__main__":
    sys.exit(main())

"""How good units and features are: ``python -m spidr.evaluate units|abx|model``.

Units against phone alignments (PNMI, purities, perplexity, bitrate), units or features by ABX, and a model by both, all
its layers and codebooks in one pass over the audio.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spidr.config import MAX_SAMPLES, SAMPLE_RATE
from spidr.data.alignments import FRAME_STEP, match_alignments, match_names, read_alignments
from spidr.data.units import read_units
from spidr.models.metrics import UnitsQuality, units_quality
from spidr.tools.command import Parser, add_device, command, write_result
from spidr.tools.errors import InputError, first_line
from spidr.tools.lazy import needs_extra
from spidr.tools.untrusted import check_memory

if TYPE_CHECKING:
    import torch

    from spidr.abx import ABX, Items, Scorer
    from spidr.models import DinoSR

Row = dict[str, Any]


# --------------------------------------------------------------------------------------------------------------------
# Units against phones


def evaluate_units(
    units: str | Path, alignments: str | Path, *, num_units: int = 256, frame_step: int = 20, tier: str | None = None
) -> UnitsQuality:
    """The quality of the units in a file.

    Args:
        units: See :func:`spidr.data.units.read_units`.
        alignments: See :func:`spidr.data.alignments.read_alignments`.
        num_units: Size of the codebook, which the bitrate depends on.
        frame_step: Milliseconds per unit.
        tier: The tier of TextGrids.

    Raises:
        InputError: A file cannot be read, a recording is not aligned, or does not fit its alignment.
    """
    sequences, aligned = read_units(units), read_alignments(alignments, tier)
    phones = match_alignments(aligned, sequences)
    if missing := sorted(sequences.keys() - phones.keys()):
        raise InputError(
            f"{alignments}: {len(missing)} of the {len(sequences)} recordings of {units} are not aligned, such as "
            f"{missing[0]}"
        )
    num_phones = len(set().union(*phones.values()))
    if num_units < 1:
        raise InputError(f"the number of units must be at least 1, not {num_units}")
    check_memory(24 * num_units * num_phones, f"counting {num_units} units")
    data: Any = {name: (phones[name], sequence) for name, sequence in sequences.items()}
    return units_quality(
        data, num_units=num_units, num_phones=num_phones, frame_step=frame_step, alignment_step=FRAME_STEP
    )


# --------------------------------------------------------------------------------------------------------------------
# ABX


class FeatureFolder(Mapping[str, NDArray[Any]]):
    """The features of a folder, one ``.npy`` or ``.pt`` file (T, D) for each recording, at any depth."""

    def __init__(self, folder: Path) -> None:
        files = sorted(file for file in folder.rglob("*") if file.suffix in (".npy", ".pt"))
        self._files = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
        if not files:
            raise InputError(f"{folder}: no .npy or .pt file in the folder")
        if len(self._files) < len(files):
            raise InputError(f"{folder}: a recording is there both as .npy and as .pt")

    def __getitem__(self, name: str) -> NDArray[Any]:
        path = self._files[name]
        try:
            if path.suffix == ".npy":
                features: NDArray[Any] = np.load(path, mmap_mode="r")
            else:
                from spidr.tools.tensors import check_plain, read_tensors

                features = check_plain(read_tensors(path), "the top").float().numpy()
            kind = features.dtype.kind
        except Exception as error:  # a broken file can fail in any way
            raise InputError(f"{path}: no features of a recording ({first_line(error)})") from None
        if kind not in "fiu":
            raise InputError(f"{path}: features must be real numbers, not {features.dtype}")
        if features.ndim != 2:
            raise InputError(f"{path}: features must be (frames, dimensions), not of shape {features.shape}")
        return features

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def evaluate_abx(source: str | Path, scorer: Scorer, distance: str | None = None) -> ABX:
    """ABX error rates of a folder of features or a file of units.

    Args:
        source: A folder (see :class:`FeatureFolder`), or a file of units (see :func:`spidr.data.units.read_units`).
        scorer: The task.
        distance: Between frames; None: "angular" for features, "identical" for units.

    Raises:
        InputError: See :meth:`spidr.abx.Scorer.score`.
    """
    path = Path(source)
    is_folder = os.path.isdir(path)  # noqa: PTH112 (False for all that cannot be a folder)
    features: Mapping[str, NDArray[Any]] = FeatureFolder(path) if is_folder else read_units(path)
    kind: Any = distance or ("angular" if is_folder else "identical")
    return scorer.score(features, kind)


# --------------------------------------------------------------------------------------------------------------------
# A model


class _Spool:
    """Features of many recordings and layers, in one file a layer, since a corpus may not fit in memory."""

    def __init__(self, folder: Path, layers: Sequence[int]) -> None:
        self.layers = layers
        self._files = {layer: (folder / f"{layer}.f32").open("w+b") for layer in layers}
        self._spans: dict[str, tuple[int, int]] = {}
        self._frames = 0

    def add(self, name: str, outputs: Sequence[torch.Tensor]) -> None:
        for layer, output in zip(self.layers, outputs, strict=True):
            self._files[layer].write(output.float().contiguous().numpy().tobytes())
        self._spans[name] = (self._frames, self._frames + len(outputs[0]))
        self._frames += len(outputs[0])

    def read(self, layer: int, dim: int) -> dict[str, NDArray[Any]]:
        self._files[layer].flush()
        whole = np.memmap(self._files[layer].name, np.float32, "r", shape=(self._frames, dim))
        return {name: whole[start:end] for name, (start, end) in self._spans.items()}

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def evaluate_model(
    model: DinoSR,
    manifest: str | Path,
    alignments: str | Path,
    *,
    items: Items | None = None,
    layers: Sequence[int] | None = None,
    device: str = "auto",
    max_batch_length: int = 3_800_000,
    tier: str | None = None,
    progress: bool = False,
) -> list[Row]:
    """Evaluate every layer and every codebook of a model, in one pass over the audio.

    Args:
        model: Any; it is moved to the device.
        manifest: The recordings; each is standardised and encoded whole.
        alignments: Of these recordings or some of them.
        items: For ABX too, of the layers' outputs (angular distance) and of the units (identical or not). The outputs
            are kept in a temporary folder: 154 kB per layer and second of audio with the base model.
        layers: Layers to evaluate, counted from 1; None: all.
        device: As ``run.device``.
        max_batch_length: Samples of a batch with its padding.
        tier: The tier of TextGrids.
        progress: Show a progress bar.

    Returns:
        For each layer ``layer``; if it has a codebook, the fields of :class:`spidr.models.metrics.UnitsQuality`; with
        ``items`` ``abx_within`` and ``abx_across`` and, with a codebook, ``units_abx_within`` and ``units_abx_across``.

    Raises:
        InputError: A file cannot be read, nothing is aligned, or the model has no such layer.
    """
    with needs_extra("train"):
        from tqdm import tqdm

        from spidr.abx import Scorer
        from spidr.data import speech_dataset
        from spidr.environment import Environment, choose_device
        from spidr.validate import codebooks_quality, encode_rows, phones_of_rows

    if not 1 <= max_batch_length <= MAX_SAMPLES:
        raise InputError(f"max_batch_length: found {max_batch_length}, expected 1 to {MAX_SAMPLES:,} samples")
    total = len(model.student.layers)
    chosen = list(range(1, total + 1)) if layers is None else sorted(set(layers))
    if wrong := [layer for layer in chosen if not 1 <= layer <= total]:
        raise InputError(f"layer must be between 1 and {total}, not {wrong[0]}")
    stride = math.prod(stride for _, _, stride in model.cfg.extractor_conv_layer_config)
    scorer = Scorer(items, frame_rate=Fraction(SAMPLE_RATE, stride)) if items is not None else None
    env = Environment(0, 0, 1, choose_device(device))
    dataset = speech_dataset(manifest, normalize=True)
    phones = phones_of_rows(dataset.manifest, read_alignments(alignments, tier))
    if not phones:
        raise InputError(f"{alignments}: aligns no recording of {manifest}")
    names = _unique_names(dataset.manifest["fileid"].to_list(), dataset.manifest["path"].to_list())
    rows_of = {name: row for row, name in enumerate(names)}
    wanted = match_names(rows_of, set(items.files)).values() if items is not None else ()
    spoken = {rows_of[name] for name in wanted}
    rows = sorted(phones.keys() | spoken)
    model = model.to(env.device)
    units: dict[int, torch.Tensor] = {}
    with tempfile.TemporaryDirectory(prefix="spidr-abx-") as folder:
        spool = _Spool(Path(folder), chosen if items is not None else ())
        encoded = encode_rows(model, dataset, rows, max_batch_length, env, layers=spool.layers)
        for row, codebooks, outputs in tqdm(encoded, total=len(rows), unit="file", disable=not progress):
            units[row] = codebooks
            if row in spoken:
                spool.add(names[row], outputs)
        if not units:
            raise InputError(f"{manifest}: no recording is long enough for a frame")
        first = model.codebook_layers.start
        qualities = codebooks_quality(model, phones, {row: units[row] for row in phones if row in units})
        table = []
        for layer in tqdm(chosen, unit="layer", disable=not progress or scorer is None):
            result: Row = {"layer": layer}
            if layer >= first:
                result |= qualities[layer - first]._asdict()
            if scorer is not None:
                score = scorer.score(spool.read(layer, model.cfg.encoder_embed_dim))
                result |= {"abx_within": score.within, "abx_across": score.across}
                if layer >= first:
                    score = scorer.score({names[row]: units[row][layer - first].numpy() for row in spoken}, "identical")
                    result |= {"units_abx_within": score.within, "units_abx_across": score.across}
            table.append(result)
        spool.close()
    return table


def _unique_names(fileids: list[str], paths: list[str]) -> list[str]:
    """What recordings are called: by their fileid, or if that is not unique, by their path."""
    return fileids if len(set(fileids)) == len(fileids) else [str(Path(path).with_suffix("")) for path in paths]


# --------------------------------------------------------------------------------------------------------------------
# Command line

COLUMNS = {
    "pnmi": ("PNMI", ".4f"),
    "phone_purity": ("phone purity", ".4f"),
    "cluster_purity": ("cluster purity", ".4f"),
    "codebook_perplexity": ("perplexity", ".2f"),
    "active_codewords": ("active", "d"),
    "bitrate": ("bit/s", ".2f"),
    "abx_within": ("ABX within", ".2%"),
    "abx_across": ("ABX across", ".2%"),
    "units_abx_within": ("units ABX within", ".2%"),
    "units_abx_across": ("units ABX across", ".2%"),
    "within": ("within speaker", ".2%"),
    "across": ("across speakers", ".2%"),
    "items": ("items", "d"),
    "too_short": ("too short", "d"),
}


def format_table(rows: Sequence[Row], first: str) -> str:
    """A table in Markdown; a value that does not exist is empty."""
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [[first, *(COLUMNS[name][0] for name in names)]]
    for row in rows:
        values = ((row.get(name), COLUMNS[name][1]) for name in names)
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


def _units(args: argparse.Namespace) -> list[Row]:
    options = {"num_units": args.num_units, "frame_step": args.frame_step, "tier": args.tier}
    return [{"units": path, **evaluate_units(path, args.alignments, **options)._asdict()} for path in args.units]


def _abx(args: argparse.Namespace) -> list[Row]:
    from spidr.abx import Scorer, read_items

    scorer = Scorer(
        read_items(args.item),
        frame_rate=args.frame_rate,
        max_size_group=args.max_size_group or None,
        max_x_across=args.max_x_across or None,
        context=args.context,
    )
    return [{"features": path, **evaluate_abx(path, scorer, args.distance)._asdict()} for path in args.features]


def _model(args: argparse.Namespace) -> list[Row]:
    from spidr.abx import read_items
    from spidr.models.hub import load_encoder

    return evaluate_model(
        load_encoder(args.checkpoint),
        args.manifest,
        args.alignments,
        items=read_items(args.item) if args.item else None,
        layers=args.layers,
        device=args.device,
        max_batch_length=args.max_batch_length,
        tier=args.tier,
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
        description="How good units and features are.",
        example="python -m spidr.evaluate units units.jsonl alignments.jsonl",
    )
    commands = parser.add_subparsers(required=True, metavar="units|abx|model")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="JSON lines instead of a table")
        return sub

    units = add("units", _units, "Units against phone alignments: PNMI, purities, perplexity, bitrate.")
    units.add_argument("units", nargs="+", help="JSON lines or Parquet with fileid and units")
    units.add_argument("--num-units", type=int, default=256, metavar="N", help="size of the codebook (default: 256)")
    units.add_argument("--frame-step", type=int, default=20, metavar="MS", help="milliseconds per unit (default: 20)")
    abx = add("abx", _abx, "ABX error rates, within and across speakers, of one or several representations.")
    abx.add_argument("features", nargs="+", help="folders of .npy or .pt files (T, D), or files of units")
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
    model = add("model", _model, "Every layer and codebook of a model, in one pass over the audio.")
    model.add_argument("checkpoint", help="a checkpoint, or the name of a published model")
    model.add_argument("manifest", help="the recordings")
    model.add_argument("--item", help="ABX item file: ABX of every layer's features and units too (default: no ABX)")
    model.add_argument("--layers", type=_layers, metavar="N,…", help="counted from 1, such as 5,6,7 (default: all)")
    add_device(model)
    model.add_argument(
        "--max-batch-length",
        type=int,
        default=3_800_000,
        metavar="SAMPLES",
        help="samples of a batch with its padding, 16,000 a second (default: 3,800,000)",
    )
    for sub in (units, model):
        sub.add_argument("alignments", help="JSON lines, a TextGrid, or a folder of TextGrids")
        sub.add_argument("--tier", help="tier of the phones in TextGrids (default: phones)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""The command line: ``python -m spidr.extract features|units|kmeans``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from spidr.tools.command import DEVICE, Parser, command
from spidr.tools.lazy import needs_extra


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = vars(_build_parser().parse_args(argv))
    with needs_extra("extract"):
        from spidr.environment import ranks
        from spidr.extract import Options, extract_features, extract_units, fit_kmeans
        from spidr.tools.logging import run_log

    functions: dict[str, Callable[..., object]] = {
        "features": extract_features,
        "units": extract_units,
        "kmeans": fit_kmeans,
    }
    function = functions[args.pop("command")]
    rank, _, processes = ranks()
    with run_log(rank, processes):
        args["progress"] = not args.pop("quiet")
        options = Options(**{name: args.pop(name) for name in Options.__dataclass_fields__})
        function(args.pop("sources"), args.pop("output"), options=options, **args)


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m spidr.extract",
        example="python -m spidr.extract units recordings units.jsonl --model spidr_base --layer 6",
        description="Features and units of recordings. Interrupted features and units resume with the same command; "
        "torchrun and srun share them among processes.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = Parser(add_help=False)
    common.add_argument("sources", nargs="+", help="manifests, lists, folders, audio files")
    common.add_argument(
        "--model", default="spidr_base", help="a published model or a checkpoint (default: %(default)s)"
    )
    common.add_argument(
        "--model-type", choices=["spidr", "dinosr"], help="of a checkpoint without config.json (default: told)"
    )
    common.add_argument("--layer", type=int, metavar="N", help="counted from 1 (default: the model's best)")
    common.add_argument("--device", **DEVICE)
    common.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "auto"],
        default="float32",
        help="of the computation (default: %(default)s; auto: bfloat16 where it is fast, 99 %% of units equal)",
    )
    common.add_argument(
        "--batch-seconds", type=float, metavar="S", help="audio in a batch (default: 0 on a CPU, else 240)"
    )
    common.add_argument("--threads", type=int, metavar="N", help="recordings at once on a CPU (default: its cores)")
    common.add_argument(
        "--window", type=float, metavar="S", help="encode long recordings in pieces of S seconds (default: whole)"
    )
    common.add_argument(
        "--context", type=float, metavar="S", help="seen on each side of a window (default: a quarter of it)"
    )
    common.add_argument("--resample", action="store_true", help="convert what is not 16 kHz mono")
    common.add_argument(
        "--on-error", choices=["raise", "skip"], default="raise", help="bad recordings (default: %(default)s)"
    )
    common.add_argument("--quiet", action="store_true", help="no progress bar")

    def add(name: str, text: str, example: str) -> argparse.ArgumentParser:
        example = f"python -m spidr.extract {name} {example}"
        return commands.add_parser(name, parents=[common], help=text, description=f"Write {text}.", example=example)

    features = add("features", "one array (frames, channels) per recording", "recordings features --model spidr_base")
    features.add_argument("output", help="a folder")
    features.add_argument(
        "--format", choices=["npy", "pt"], default="npy", dest="file_format", help="(default: %(default)s)"
    )
    features.add_argument(
        "--store",
        choices=["float32", "float16"],
        default="float32",
        dest="output_dtype",
        help="precision in the files (default: %(default)s)",
    )

    units = add("units", "one row of units per recording", "recordings units.jsonl --model spidr_base --dedup")
    units.add_argument("output", help="a .jsonl or .parquet file")
    units.add_argument(
        "--format",
        choices=["spidr", "discophon", "slamkit", "unit-hifigan", "fairseq", "km"],
        default="spidr",
        dest="file_format",
        help="what reads the units (default: %(default)s)",
    )
    units.add_argument("--language", metavar="CODE", help="for DiscoPhon's file names, with --split (default: none)")
    units.add_argument("--split", metavar="NAME", help="dev, test, train-10min, train-1h or train-10h (default: none)")
    units.add_argument("--dedup", action="store_true", help="merge repeats, with their durations in frames")
    units.add_argument("--kmeans", metavar="FILE", help="the nearest of these centroids (default: the codebook)")
    units.add_argument(
        "--smooth",
        type=float,
        default=0.0,
        metavar="COST",
        help="of each change of unit: fewer, longer units (default: 0)",
    )

    kmeans = add("kmeans", "centroids for `units --kmeans`", "train.csv kmeans.npz --model spidr_base --layer 6")
    kmeans.add_argument("output", help="a .npz file")
    kmeans.add_argument("--units", type=int, default=256, metavar="N", help="clusters (default: %(default)s)")
    kmeans.add_argument(
        "--max-frames", type=int, default=1_000_000, metavar="N", help="frames to learn from (default: %(default)s)"
    )
    kmeans.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the draw and of k-means (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

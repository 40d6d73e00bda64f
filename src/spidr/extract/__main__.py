"""The command line: ``python -m spidr.extract features|units|kmeans``."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, get_args

from spidr.extract.formats import UnitFormat
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

    functions: dict[str, Any] = {"features": extract_features, "units": extract_units, "kmeans": fit_kmeans}
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
    option = common.add_argument
    option("sources", nargs="+", help="manifests, lists, folders, audio files")
    option("--model", default="spidr_base", help="a published model or a checkpoint (default: %(default)s)")
    option("--model-type", choices=["spidr", "dinosr"], help="for checkpoints without config.json (default: detected)")
    option("--layer", type=int, metavar="N", help="counted from 1 (default: the model's best)")
    option("--device", **DEVICE)
    text = "of the computation (default: %(default)s; auto: bfloat16 where it is fast; 99 %% of units are equal)"
    option("--dtype", choices=["float32", "bfloat16", "auto"], default="float32", help=text)
    option("--batch-seconds", type=float, metavar="S", help="audio in a batch (default: 0 on a CPU, else 240)")
    option("--threads", type=int, metavar="N", help="recordings at once on a CPU (default: its cores)")
    option("--window", type=float, metavar="S", help="encode long recordings in pieces of S seconds (default: whole)")
    option("--context", type=float, metavar="S", help="context on each side of a window (default: a quarter of it)")
    option("--resample", action="store_true", help="convert recordings to 16 kHz mono")
    option("--on-error", choices=["raise", "skip"], default="raise", help="for bad recordings (default: %(default)s)")
    option("--quiet", action="store_true", help="no progress bar")

    def add(name: str, text: str, output: str, example: str) -> Any:
        example = f"python -m spidr.extract {name} {example}"
        form = commands.add_parser(name, parents=[common], help=text, description=f"Write {text}.", example=example)
        form.add_argument("output", help=output)
        return form.add_argument

    example = "recordings features --model spidr_base"
    option = add("features", "one array (frames, channels) per recording", "a folder", example)
    option("--format", choices=["npy", "pt"], default="npy", dest="file_format", help="(default: %(default)s)")
    text = "precision in the files (default: %(default)s)"
    option("--store", choices=["float32", "float16"], default="float32", dest="output_dtype", help=text)

    example = "recordings units.jsonl --model spidr_base --dedup"
    option = add("units", "one row of units per recording", "a .jsonl or .parquet file", example)
    text, formats = "program that reads the units (default: %(default)s)", get_args(UnitFormat)
    option("--format", choices=formats, default="spidr", dest="file_format", help=text)
    option("--language", metavar="CODE", help="for DiscoPhon's file names, with --split (default: none)")
    option("--split", metavar="NAME", help="dev, test, train-10min, train-1h or train-10h (default: none)")
    option("--dedup", action="store_true", help="merge repeats, with their durations in frames")
    option("--kmeans", metavar="FILE", help="use these centroids (default: the codebook)")
    text = "cost of each change of unit, for fewer, longer units (default: 0)"
    option("--smooth", type=float, default=0.0, metavar="COST", help=text)

    example = "train.csv kmeans.npz --model spidr_base --layer 6"
    option = add("kmeans", "centroids for `units --kmeans`", "a .npz file", example)
    option("--units", type=int, default=256, metavar="N", help="clusters (default: %(default)s)")
    text = "frames to learn from (default: %(default)s)"
    option("--max-frames", type=int, default=1_000_000, metavar="N", help=text)
    option("--seed", type=int, default=0, metavar="N", help="seed of the draw and of k-means (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""The command line: ``python -m spidr.extract features|units|kmeans``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from spidr.tools.command import Parser, add_device, command
from spidr.tools.lazy import needs_extra


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = _build_parser().parse_args(argv)
    with needs_extra("extract"):
        from spidr.environment import ranks
        from spidr.extract import Options, extract_features, extract_units, fit_kmeans
        from spidr.tools.logging import run_log

    with run_log(ranks()[0]):
        options = Options(
            device=args.device,
            dtype=args.dtype,
            batch_seconds=args.batch_seconds,
            threads=args.threads,
            window=args.window,
            context=args.context,
            resample=args.resample,
            on_error=args.on_error,
            progress=not args.quiet,
        )
        common = {"model": args.model, "layer": args.layer, "options": options}
        if args.command == "features":
            extract_features(args.sources, args.output, file_format=args.format, output_dtype=args.store, **common)
        elif args.command == "units":
            extract_units(args.sources, args.output, dedup=args.dedup, kmeans=args.kmeans, **common)
        else:
            fit_kmeans(
                args.sources,
                args.output,
                units=args.units,
                max_frames=args.max_frames,
                seed=args.seed,
                **common,
            )


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m spidr.extract",
        example="python -m spidr.extract units recordings units.jsonl --model spidr_base --layer 6",
        description="Features and units of recordings. Both, started again, go on where they stopped; started by "
        "torchrun or as several SLURM tasks, their processes share the work. kmeans runs in one process and begins "
        "again.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = Parser(add_help=False)
    common.add_argument("sources", nargs="+", help="manifests (.csv, .jsonl, .tsv), folders, audio files")
    common.add_argument(
        "--model", default="spidr_base", help="name of a published model, or a checkpoint (default: %(default)s)"
    )
    common.add_argument("--layer", type=int, metavar="N", help="counted from 1 (default: 6 for SpidR, 5 for DinoSR)")
    add_device(common)
    common.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "auto"],
        default="float32",
        help="to compute in; auto: bfloat16 where the hardware does (default: %(default)s)",
    )
    common.add_argument(
        "--batch-seconds",
        type=float,
        metavar="SECONDS",
        help="audio in a batch, in seconds; 0: one recording at a time (default: 0 on a CPU, else 240)",
    )
    common.add_argument(
        "--threads", type=int, metavar="N", help="recordings encoded at once on a CPU, 1 to 1,000 (default: its cores)"
    )
    common.add_argument(
        "--window",
        type=float,
        metavar="SECONDS",
        help="encode long recordings in pieces of so many seconds (default: each as a whole)",
    )
    common.add_argument(
        "--context",
        type=float,
        metavar="SECONDS",
        help="what is seen on each side of a window, in seconds (default: a quarter of it)",
    )
    common.add_argument("--resample", action="store_true", help="convert what is not 16 kHz mono (needs FFmpeg)")
    common.add_argument(
        "--on-error", choices=["raise", "skip"], default="raise", help="bad recordings (default: %(default)s)"
    )
    common.add_argument("--quiet", action="store_true", help="no progress bar")

    features = commands.add_parser("features", parents=[common], help="one array (frames, channels) a recording")
    features.add_argument("output", help="a folder")
    features.add_argument(
        "--format", choices=["npy", "pt"], default="npy", help="of NumPy, or torch.save (default: %(default)s)"
    )
    features.add_argument(
        "--store", choices=["float32", "float16"], default="float32", help="precision in files (default: %(default)s)"
    )

    units = commands.add_parser("units", parents=[common], help="one row of units a recording")
    units.add_argument("output", help="a .jsonl or .parquet file")
    units.add_argument("--dedup", action="store_true", help="merge repeats and add their durations, in frames")
    units.add_argument(
        "--kmeans", metavar="FILE", help="centroids to use, a .npz file, and their layer (default: the codebook)"
    )

    kmeans = commands.add_parser("kmeans", parents=[common], help="centroids for `units --kmeans`")
    kmeans.add_argument("output", help="a .npz file")
    kmeans.add_argument("--units", type=int, default=256, metavar="N", help="clusters (default: %(default)s)")
    kmeans.add_argument(
        "--max-frames",
        type=int,
        default=1_000_000,
        metavar="N",
        help="frames of 20 ms to learn from, drawn at random (default: %(default)s)",
    )
    kmeans.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the draw and of k-means (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""The command line: ``python -m spidr.report RUN``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from spidr.tools.errors import InputError
from spidr.tools.lazy import needs_extra


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m spidr.report", description="A run on one page, with its figures as PNG."
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, help="folder for index.html and the PNGs (default: RUN/report)")
    parser.add_argument(
        "--set", dest="group", help="validation set of which units are shown (default: the first aligned)"
    )
    parser.add_argument(
        "--layer", type=int, metavar="N", help="of the heat map, counted from 1 (default: the one of the best PNMI)"
    )
    parser.add_argument(
        "--max-minutes",
        type=float,
        default=30.0,
        metavar="MINUTES",
        help="audio to encode at most, in minutes (default: 30)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cuda", "mps", "cpu"),
        default="auto",
        help="where to compute (default: %(default)s: CUDA, else MPS, else the CPU)",
    )
    args = parser.parse_args(argv)
    options = {"group": args.group, "layer": args.layer, "max_minutes": args.max_minutes, "device": args.device}
    try:
        with needs_extra("train,plot"):
            from spidr.report.contents import make_report

        page = make_report(args.run, args.output, **options)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{page}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

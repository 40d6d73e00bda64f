"""The command line: ``python -m spidr.report RUN``."""

import sys
from collections.abc import Sequence
from pathlib import Path

from spidr.tools.command import DEVICE, Parser, command, write_result
from spidr.tools.lazy import needs_extra


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(
        "python -m spidr.report",
        description="A run on one page, with its figures as PNG.",
        example="python -m spidr.report runs/quickstart/spidr",
    )
    add = parser.add_argument
    add("run", type=Path, help="run folder")
    add("--output", type=Path, help="folder for index.html and the PNGs (default: RUN/report)")
    add("--set", dest="group", help="validation set whose units are shown (default: the first aligned)")
    add("--layer", type=int, metavar="N", help="layer of the heat map, counted from 1 (default: best PNMI)")
    add("--max-minutes", type=float, default=30.0, metavar="MINUTES", help="most audio to encode (default: 30)")
    add("--device", **DEVICE)
    args = vars(parser.parse_args(argv))
    with needs_extra("train,plot"):
        from spidr.report.contents import make_report

    write_result(f"{make_report(**args)}\n")


if __name__ == "__main__":
    sys.exit(main())

"""Write the features of one layer of a model: OUTPUT/<file stem>.pt, float32 (frames, dimensions), 50 frames a second.

    python paper/extract_features.py MANIFEST OUTPUT [--layer 6] [--checkpoint spidr_base]

Figures 8 and 9 are drawn from these, and fastabx reads them. `python -m spidr.extract features` does the same with more
options. It takes as long as the model needs for the recordings; interrupt it at any time and rerun it to resume.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from spidr.tools.command import DEVICE, Parser, command
from spidr.tools.lazy import command_needs
from spidr.tools.threads import set_up_threads

if __name__ == "__main__":
    set_up_threads()  # before torch is loaded
with command_needs("paper", __name__):
    from spidr.extract import Options, extract_features


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", help="from python -m spidr.data.write_manifest, or a folder")
    parser.add_argument("output", help="a folder")
    parser.add_argument("--layer", type=int, help="counted from 1 (default: 6 for SpidR, 5 for DinoSR)")
    parser.add_argument("--checkpoint", default="spidr_base", help="or a published model (default: %(default)s)")
    parser.add_argument("--device", **DEVICE)
    args = parser.parse_args(argv)
    extract_features(
        args.manifest,
        args.output,
        model=args.checkpoint,
        layer=args.layer,
        file_format="pt",
        flat=True,
        options=Options(device=args.device),
    )


if __name__ == "__main__":
    sys.exit(main())

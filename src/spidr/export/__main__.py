"""``python -m spidr.export safetensors|onnx|transformers MODEL OUTPUT``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from spidr.tools.errors import InputError

DESCRIPTION = "Write a trained model, without its teacher, for other software."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser("python -m spidr.export", description=DESCRIPTION)
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    texts = {
        "safetensors": "one file of weights and configuration, which build_model(checkpoint=OUTPUT) loads",
        "onnx": "one file that maps (waveforms, lengths) to features and units of layers",
        "transformers": "a folder for AutoModel.from_pretrained(OUTPUT, trust_remote_code=True)",
    }
    for name, text in texts.items():
        command = formats.add_parser(name, help=text, description=f"Write {text}.")
        command.add_argument("model", metavar="MODEL", help="spidr_base or another published model, or a checkpoint")
        command.add_argument("output", metavar="OUTPUT", type=Path, help="what to write; it must not exist")
        if name == "onnx":
            command.add_argument(
                "--layers", type=int, nargs="+", metavar="N", help="counted from 1 (default: the best for units)"
            )
    args = parser.parse_args(argv)
    try:
        exists, parent = os.path.exists(args.output), os.path.dirname(os.path.abspath(args.output))  # noqa: PTH100, PTH110, PTH120
        if exists or not os.path.isdir(parent):  # noqa: PTH112 (these know no name that is too long)
            reason = "exists" if exists else "is in a folder that does not exist"
            raise InputError(f"{args.output}: {reason}; choose another output")
        _export(args)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{args.output}\n")
    return 0


def _export(args: argparse.Namespace) -> None:
    from spidr.export import export_onnx, export_safetensors, export_transformers
    from spidr.models.hub import load_encoder

    model = load_encoder(args.model)
    if args.format == "safetensors":
        export_safetensors(model, args.output)
    elif args.format == "onnx":
        export_onnx(model, args.output, layers=args.layers)
    else:
        export_transformers(model, args.output)


if __name__ == "__main__":
    sys.exit(main())

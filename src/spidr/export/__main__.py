"""``python -m spidr.export safetensors|onnx|transformers MODEL OUTPUT``."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from spidr.tools.command import Parser, command, write_result
from spidr.tools.errors import InputError


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(
        "python -m spidr.export",
        description="Write a trained model, without its teacher, for other software.",
        example="python -m spidr.export safetensors runs/quickstart/spidr/final.pt encoder.safetensors",
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    texts = {
        "safetensors": "one file of weights and configuration, which build_model(checkpoint=OUTPUT) loads",
        "onnx": "one file that maps (waveforms, lengths) to features and units of layers",
        "transformers": "a folder for AutoModel.from_pretrained(OUTPUT, trust_remote_code=True)",
    }
    for name, text in texts.items():
        output = "encoder" if name == "transformers" else f"encoder.{name}"
        example = f"python -m spidr.export {name} spidr_base {output}"
        add = formats.add_parser(name, help=text, description=f"Write {text}.", example=example).add_argument
        add("model", metavar="MODEL", help="spidr_base or another published model, or a checkpoint")
        add("output", metavar="OUTPUT", type=Path, help="output; must not exist")
        add("--model-type", choices=("spidr", "dinosr"), help="for checkpoints without config.json (default: detected)")
        if name == "onnx":
            add("--layers", type=int, nargs="+", metavar="N", help="counted from 1 (default: the best for units)")
    args = parser.parse_args(argv)
    exists, parent = os.path.exists(args.output), os.path.dirname(os.path.abspath(args.output))  # noqa: PTH100, PTH110, PTH120
    if exists or not os.path.isdir(parent):  # noqa: PTH112 (these know no name that is too long)
        reason = "exists" if exists else "is in a folder that does not exist"
        raise InputError(f"{args.output}: {reason}; choose another output")
    from spidr.export import export_onnx, export_safetensors, export_transformers
    from spidr.models.hub import load_encoder

    model = load_encoder(args.model, args.model_type)
    if args.format == "onnx":
        export_onnx(model, args.output, layers=args.layers)
    else:
        (export_safetensors if args.format == "safetensors" else export_transformers)(model, args.output)
    write_result(f"{args.output}\n")


if __name__ == "__main__":
    sys.exit(main())

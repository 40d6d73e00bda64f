"""``python -m spidr.models``: the published models."""

import sys
from collections.abc import Sequence

from spidr.models.published import PUBLISHED
from spidr.tools.command import Parser, command, write_result

EPILOG = (
    'Use a name wherever a model is asked for: build_model("spidr_base") in Python, --model spidr_base on the command '
    'line, init_ckpt = "spidr_base" in a configuration. Its file is downloaded once, to torch.hub\'s folder. Any other '
    "file: hf:OWNER/NAME/FILE on the Hugging Face hub, or https://…"
)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    example = "python -m spidr.models"
    Parser(example, description="List the published models.", epilog=EPILOG, example=example).parse_args(argv)
    for model in PUBLISHED.values():
        write_result(
            f"{model.name}\n  {model.about}.\n  Best layer for units: {model.best_layer}. "
            f"Weights: {model.licence}. Cite {model.citation}.\n  {model.file}\n"
        )


if __name__ == "__main__":
    sys.exit(main())

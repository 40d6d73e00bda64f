"""Build the guides and the API reference as one site: ``python docs/build.py [FOLDER]``, by default in ``docs/build``.

It needs the extra ``docs`` and no network. Warnings are errors.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Build the site."""
    try:
        from sphinx.cmd.build import build_main
    except ModuleNotFoundError as error:
        sys.stderr.write(f"error: `{error.name}` is missing: install it with `pip install 'spidr[docs]'`\n")
        return 2
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "build"
    status = build_main(["-b", "html", "-q", "-W", "--keep-going", "-j", "2", str(HERE), str(output)])
    if status == 0:
        sys.stdout.write(f"{output / 'index.html'}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())

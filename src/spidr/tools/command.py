"""How every command ends: with one line for what the user can put right, and a status that says whether it worked."""

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

from spidr.tools.errors import InputError

P = ParamSpec("P")


def command(main: Callable[P, int | None]) -> Callable[P, int]:
    """Decorate the main function of a command.

    Args:
        main: Returns the exit status; None is 0.

    Returns:
        The same function, except that an :class:`InputError` is printed on one line and gives status 2.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except InputError as error:
            line_break = "\n" if "RANK" in os.environ else ""  # another process's progress bar may be on this line
            sys.stderr.write(f"{line_break}error: {error}\n")
            return 2

    return run

"""Shared by all commands: parsing arguments, writing results, and ending."""

import argparse
import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, ParamSpec, TextIO, cast

from spidr.tools.errors import InputError

P = ParamSpec("P")

PROGRAMS = {
    "train": "spidr",
    "manifest": "spidr.data.write_manifest",
    "extract": "spidr.extract",
    "evaluate": "spidr.evaluate",
    "export": "spidr.export",
    "report": "spidr.report",
    "models": "spidr.models",
    "metrics": "spidr.tools.metrics_queue",
    "warm-start": "spidr.warm_start",
}
"""``spidr NAME`` is ``python -m MODULE``."""

USER_ERRORS = (
    *("EACCES", "EDQUOT", "EFBIG", "EIO", "EISDIR", "ELOOP", "EMFILE", "ENAMETOOLONG", "ENOENT", "ENOSPC", "ENOTDIR"),
    *("EPERM", "EROFS", "ESTALE", "ETXTBSY"),
)
"""File system errors that the user can fix."""

_results: list[TextIO | None] = []  # None: standard output was closed


def write_result(text: str) -> None:
    """Write to standard output, which gets results only; everything else goes to standard error."""
    stream = _results[-1] if _results else sys.stdout
    if stream is not None:
        stream.write(text)
        stream.flush()


def command(main: Callable[P, int | None]) -> Callable[P, int]:
    """Decorate the main function of a command, so that it ends with a status and at most one line.

    Args:
        main: Returns the exit status; None is 0. It writes results with :func:`write_result`.

    Returns:
        The function, with status 2 after an :class:`InputError` or a file system error that the user can fix, 130 after
        Ctrl-C, and 141 when the reader of the results is gone. It ignores a closed standard error.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        with lasting_stderr(), _results_only():
            try:
                return main(*args, **kwargs) or 0
            except InputError as error:
                return _say(f"error: {error.with_guide()}", 2)
            except SystemExit as end:
                says_why = isinstance(end.code, int) and str(end) != str(end.code)
                if says_why and len(_results) == 1 and os.environ.get("RANK", "0") == "0":
                    _say(str(end), 0)
                raise
            except KeyboardInterrupt:
                return _say("interrupted; run the same command again", 130)
            except BrokenPipeError:
                with suppress(OSError, ValueError):  # otherwise Python complains when it flushes at exit
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # type: ignore[union-attr]
                return 141
            except OSError as error:
                if errno.errorcode.get(error.errno or 0) not in USER_ERRORS:
                    raise
                return _say(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}", 2)

    return run


def _say(text: str, status: int) -> int:
    line_break = "\n" if "RANK" in os.environ else ""  # this line may hold another process's progress bar
    sys.stderr.write(f"{line_break}{text}\n")
    return status


class _Lasting:
    """A stream that drops what cannot be written because its reader is gone or the disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _results_only() -> Iterator[None]:
    """Redirect ``sys.stdout`` to standard error, except for :func:`write_result`."""
    _results.append(_results[-1] if _results else sys.stdout)
    try:
        with redirect_stdout(cast("TextIO", _Lasting(sys.stderr))):
            yield
    finally:
        _results.pop()


@contextmanager
def lasting_stderr() -> Iterator[None]:
    """Survive a closed or full standard error."""
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        redirect_stderr(cast("TextIO", _Lasting(sys.stderr or nowhere))),
    ):
        yield


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=32, **options)

    def add_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None = None) -> None:  # noqa: ARG002
        """Show the arguments only, since the options are listed below."""
        arguments = [action for action in actions if not action.option_strings]
        options = [argparse.Action(["options"], "options", nargs=0)] if len(arguments) < len(actions) else []
        super().add_usage(usage, [*options, *arguments], [], prefix)


class Parser(argparse.ArgumentParser):
    """A parser whose help fits on a screen and ends with an example.

    ``prog`` is ``python -m MODULE``, shown as ``spidr NAME`` if it was called that way.
    """

    def __init__(self, prog: str | None = None, *, example: str = "", **options: Any) -> None:
        if prog is not None and Path(sys.argv[0]).name == "spidr":
            names = {f"python -m {module}": f"spidr {name}" for name, module in PROGRAMS.items()}
            prog = names.get(prog, prog)
        super().__init__(prog, **{"formatter_class": _Formatter} | options)
        self.example = example

    def format_help(self) -> str:
        """Format the help, with the example at its end."""
        example = "".join(f"  {line}\n" for line in self.example.splitlines())
        return super().format_help() + (f"\nexample:\n{example}" if example else "")

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is sys.stderr:
            super()._print_message(message, file)
        else:  # help and versions are results
            write_result(message)


DEVICE: dict[str, Any] = {
    "choices": ("auto", "cuda", "mps", "cpu"),
    "default": "auto",
    "help": "where to compute (default: auto: CUDA, else MPS, else the CPU)",
}
"""Options of ``add_argument("--device", …)``."""

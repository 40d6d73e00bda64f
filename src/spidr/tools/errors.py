"""Errors that a user can fix, and helpers for messages."""

from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """Wrong input. The message names the file, key or row and the remedy; commands print it and exit with status 2.

    Args:
        message: One or several lines.
        guide: The page of ``docs/`` that helps, and its section: ``"questions.md#my-loss-is-not-finite"``.
    """

    def __init__(self, message: str, *, guide: str = "") -> None:
        super().__init__(message)
        self.guide = guide
        if guide:
            self.add_note(f"see docs/{guide}")  # below a traceback, as in notebooks

    def with_guide(self) -> str:
        """The message and where to read more, on one line if the message has one line."""
        text = str(self)
        gap = "\n" if "\n" in text else " "
        return f"{text}{gap}(see docs/{self.guide})" if self.guide else text


class ProblemsError(InputError):
    """All problems of one table, as (dotted key, text) pairs."""

    def __init__(self, problems: Iterable[tuple[str, str]], source: str = "", *, guide: str = "") -> None:
        self.problems = list(problems)
        lines = [f"{key}: {text}" if key else text for key, text in self.problems]
        if len(lines) > 1:
            lines = [f"{len(lines)} problems", *(f"  {line}" for line in lines)]
        super().__init__((f"{source}: " if source else "") + "\n".join(lines), guide=guide)

    def under(self, key: str) -> list[tuple[str, str]]:
        """The problems, with keys relative to the enclosing table."""
        return [(f"{key}.{inner}" if inner else key, text) for inner, text in self.problems]


def first_line(error: BaseException) -> str:
    """First line of an exception's message, at most 200 characters; its type if the message is empty."""
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__


def some(items: Sequence[object], most: int = 5, separator: str = ", ") -> str:
    """The first items of a list, and how many more there are."""
    end = f"{' ' if separator == ', ' else separator}and {len(items) - most:,} more"
    return separator.join(map(str, items[:most])) + (end if len(items) > most else "")

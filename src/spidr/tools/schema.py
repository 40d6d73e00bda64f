"""Dataclasses that check themselves.

A field's annotation gives its type and, through :data:`typing.Annotated`, the values it accepts; ``RULES`` of the class
lists what several fields must satisfy together. Tables from files and arguments from Python go through the same checks,
and all problems of a table are reported at once.
"""

import dataclasses
import difflib
import math
import os
import reprlib
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from spidr.tools.errors import ProblemsError


@dataclass(frozen=True)
class Accepts:
    """The values of its type that a field accepts; ``text`` completes "an integer …" in the error message."""

    text: str
    test: Callable[[Any], bool] = dataclasses.field(repr=False)  # what ``help`` shows would change at each start


@dataclass(frozen=True)
class Rule:
    """What several fields must satisfy together; a problem is reported under the first of them."""

    fields: tuple[str, ...]
    test: Callable[..., bool]
    text: str


def between(low: int, high: int) -> Accepts:
    """Accept sizes within bounds; without an upper one, a typo would run out of memory far from here."""
    return Accepts(f"of at least {low} and at most {high:,}", lambda n: low <= n <= high)


REQUIRED: Any = object()  # stands for a missing value of a setting without a default

T = TypeVar("T")


def ours(default: T) -> T:
    """Default of a setting that the published package lacks; files that we write omit it at its default."""
    return dataclasses.field(default=default, metadata={"ours": True})


@dataclass(frozen=True)
class Settings:
    """A dataclass whose fields are checked when it is built: each by its annotation, then together by ``RULES``."""

    RULES: ClassVar[tuple[Rule, ...]] = ()
    ELSEWHERE: ClassVar[Mapping[str, str]] = {}
    """Keys that belong to another class, and the message for each."""

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        values: dict[str, Any] = {}
        for name, hint in hints_of(type(self)).items():
            try:
                values[name] = _convert(getattr(self, name), hint)
            except ProblemsError as error:
                problems += error.under(show_key(name))
            else:
                object.__setattr__(self, name, values[name])
        for rule in self.RULES:
            if values.keys() >= set(rule.fields) and not rule.test(*(values[name] for name in rule.fields)):
                found = ", ".join(f"{name} = {show(values[name])}" for name in rule.fields)
                problems.append((rule.fields[0], f"{rule.text} (found {found})"))
        if problems:
            raise ProblemsError(problems, type(self).__name__)

    def __repr__(self) -> str:
        """The settings that differ from their defaults."""
        values = {}
        for field in dataclasses.fields(self):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if (value := getattr(self, field.name)) != default:
                values[field.name] = value
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"


S = TypeVar("S", bound=Settings)


def from_table(cls: type[S], table: Any) -> S:
    """Build a dataclass from a parsed table; raise the problems of all its keys together."""
    if not isinstance(table, Mapping):
        raise ProblemsError([("", f"found {show(table)}, accepted: a table")])
    settings = {f.name: f for f in dataclasses.fields(cls) if f.compare}
    problems = [(show_key(key), _unknown(cls, key, list(settings))) for key in table if key not in settings]
    required = (name for name, f in settings.items() if f.default is f.default_factory is dataclasses.MISSING)
    try:
        result = cls(**dict.fromkeys(required, REQUIRED) | {key: table[key] for key in table if key in settings})
    except ProblemsError as error:
        problems += error.problems
    if problems:
        raise ProblemsError(problems)
    return result


def _unknown(cls: type[Settings], key: str, names: list[str]) -> str:
    if key in cls.ELSEWHERE:
        return cls.ELSEWHERE[key]
    nearest = difflib.get_close_matches(key, names, n=1)
    return f"unknown key, did you mean {nearest[0]}?" if nearest else f"unknown key, accepted: {', '.join(names)}"


def hints_of(cls: type) -> dict[str, Any]:
    """Annotations of the fields that a file may set."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.compare}


def _convert(value: Any, hint: Any) -> Any:
    """Convert integers to floats, lists to tuples, tables to dataclasses. Raises ProblemsError if that fails."""
    if value is REQUIRED:
        raise ProblemsError([("", f"missing, required: {describe(hint)}")])
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_table(hint, value)  # type: ignore[arg-type, type-var]
    if get_origin(hint) in (Union, types.UnionType):
        return _convert_union(value, get_args(hint))
    if get_origin(hint) is dict and isinstance(value, Mapping):
        return _convert_values(value, *get_args(hint))
    try:
        return _convert_scalar_or_list(value, hint)
    except TypeError:
        raise ProblemsError([("", f"found {show(value)}, accepted: {describe(hint)}")]) from None


def _convert_union(value: Any, hints: tuple[Any, ...]) -> Any:
    kinds = [hint for hint in hints if hint is not types.NoneType]
    if value is None and len(kinds) < len(hints):
        return None
    if len(kinds) == 1:
        return _convert(value, kinds[0])
    for hint in kinds:
        with suppress(ProblemsError):
            return _convert(value, hint)
    raise ProblemsError([("", f"found {show(value)}, accepted: {' or '.join(map(describe, kinds))}")])


def _convert_values(table: Mapping[str, Any], key_hint: Any, value_hint: Any) -> dict[str, Any]:
    problems: list[tuple[str, str]] = []
    result = {}
    for key, value in table.items():
        try:
            result[_convert(key, key_hint)] = _convert(value, value_hint)
        except ProblemsError as error:
            problems += error.under(show_key(key))
    if problems:
        raise ProblemsError(problems)
    return result


def _convert_scalar_or_list(value: Any, hint: Any) -> Any:
    """Convert as :func:`_convert`, but raise TypeError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        converted = _convert_scalar_or_list(value, arguments[0])
        if all(accepts.test(converted) for accepts in arguments[1:]):
            return converted
    elif origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif origin is list and isinstance(value, (list, tuple)):
        return [_convert_scalar_or_list(item, arguments[0]) for item in value]
    elif origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(arguments):
        return tuple(map(_convert_scalar_or_list, value, arguments))
    elif isinstance(value, bool):  # Python's bool is an int, a file's is not
        if hint is bool:
            return value
    elif hint is int and isinstance(value, int) and abs(value) < 2**63:
        return value
    elif hint is float and isinstance(value, (int, float)) and abs(value) < 2**1023 and math.isfinite(value):
        return float(value)
    elif hint is str and isinstance(value, os.PathLike):
        return _convert_scalar_or_list(os.fspath(value), str)
    elif hint is str and isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value):
        return value
    raise TypeError


_NAMES = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}


def describe(hint: Any) -> str:
    """Say what an annotation accepts."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join([describe(arguments[0]), *(accepts.text for accepts in arguments[1:])])
    if origin is Literal:
        *names, last = map(show, arguments)
        return f"{', '.join(names)} or {last}"
    if origin is list:
        return f"a list, each {describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {describe(arguments[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments if argument is not types.NoneType)
    return _NAMES.get(hint, "a table")


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print more than 4,300 decimal digits; a file may have them in hexadecimal.
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"{hex(x)[:40]}..."


_short = _Short()
_short.maxstring = _short.maxother = _short.maxlong = 80


def show(value: Any) -> str:
    """Show a value roughly as the user wrote it, cut to a readable length."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return f"a table of {len(value)} keys"
    return _short.repr(value)


def show_key(key: str) -> str:
    """Show a key, quoted unless it is a plain name."""
    return key if key.replace("-", "_").isidentifier() and len(key) < 80 else _short.repr(key)

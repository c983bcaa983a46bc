"""Where an option's value comes from: one set of rules for the command line, YAML, Python, studies and benches.

Each source goes over the one before: defaults < what the target implies < recipe < `--config FILE` < the caller's own
values (flags or keyword arguments). Values are converted to their fields' types here, and checked against their ranges.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from fastmae.config.ranges import Range
from fastmae.config.teacher import TEACHER, GivenTeacher, as_name, refuse_code
from fastmae.errors import InputError
from fastmae.outside import documents

Layer = tuple[str, Mapping[str, Any]]
"""A source of values: its name for messages ('' for the caller), and option -> value."""
COMMAND_LINE_ONLY = ("json", "print_config", "traceback")
"""Flags that mean nothing to a caller from Python."""
CALLER_ONLY = ("config", *COMMAND_LINE_ONLY)
"""Options that a file can't set."""
OPTION_LINES = "give `option: value` lines, as --print-config prints them"
SHOWN_CHARACTERS = 80
"""Of a value, in a message."""


def resolved(kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every option.

    Args:
        kind: the options' class.
        given: what the caller asks for: flags or keyword arguments.

    Raises:
        InputError: an unknown option, one that is missing, or a value of the wrong type.
    """
    values = {option.name: option.default for option in fields(kind) if option.default is not MISSING}
    above = [("", given)]
    complete = given.keys() >= {option.name for option in fields(kind)}  # as in `dataclasses.replace`
    if given.get("config") is not None and not complete:
        above.insert(0, (str(given["config"]), read_yaml(Path(given["config"]))))
    above = [(source, _by_name(kind, source, layer)) for source, layer in above]
    asked = {name: value for _, layer in above for name, value in layer.items()}
    hints = get_type_hints(kind, include_extras=True)
    for source, layer in [*kind.layers(asked), *above]:
        prefix = f"{source}: " if source else ""
        for name, value in layer.items():
            if source and name not in above[-1][1] and TEACHER in getattr(hints[name], "__metadata__", ()):
                refuse_code(value, f"{prefix}{name}", label(kind, name))
            values[name] = converted(hints[name], value, f"{prefix}{label(kind, name)}")
    missing = [option.name for option in fields(kind) if option.name not in values]
    if missing and values.get("print_config"):  # the places to read and write need not be named
        return values | {name: converted(hints[name], placeholder(hints[name], name), name) for name in missing}
    if missing:
        raise InputError(f"give {' and '.join(label(kind, name) for name in missing)}")
    return values


def converted(hint: Any, value: Any, name: str) -> Any:
    """A value as its field's type: text is parsed, lists become tuples; nothing is rounded or guessed.

    Args:
        hint: the type, with its range where it has one.
        value: text from the command line or a file, or a Python value.
        name: the option's name, for messages.

    Raises:
        InputError: a value that is not of the type, or out of its range.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        named = as_name(value) if TEACHER in hint.__metadata__ else value
        plain = named if isinstance(named, GivenTeacher) else converted(arguments[0], named, name)
        _check_range(range_of(hint), plain, name)
        return plain
    if origin in (Union, UnionType) and NoneType in arguments:
        if value is None or value == "None":
            return None
        return converted(next(kind for kind in arguments if kind is not NoneType), value, name)
    if value is None:
        raise InputError(f"{name}: needs a value")
    if origin is Literal:
        if value not in arguments:
            raise InputError(
                f"{name} {shown(value)}: give one of {', '.join(map(repr, arguments))}{near(value, arguments)}"
            )
        return value
    if origin in (tuple, Union, UnionType):
        either = words_or_numbers(hint)
        return _word_or_numbers(*either, value, name) if either else _converted_tuple(arguments, value, name)
    return _converted_number(hint, value, name) if hint in (int, float) else _converted_simple(hint, value, name)


def _word_or_numbers(words: tuple[str, ...], numbers: Any, value: Any, name: str) -> Any:
    if isinstance(value, str) and value in words:
        return value
    try:
        return converted(numbers, value, name)
    except InputError as error:
        shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
        wanted = f"{', '.join(words)}, or {len(get_args(numbers))} numbers"
        raise InputError(f"{name} {shown}: give {wanted}{near(value, words)}") from error


def words_or_numbers(hint: Any) -> tuple[tuple[str, ...], Any] | None:
    """The words and the tuple of a type `Literal[...] | tuple[...]`; None for any other type."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    kinds = {get_origin(kind): kind for kind in get_args(hint)}
    return (get_args(kinds[Literal]), kinds[tuple]) if kinds.keys() == {Literal, tuple} else None


def _converted_simple(kind: type, value: Any, name: str) -> Any:
    """A bool, a str or a Path. YAML reads `middle_size: 96` and `run: 2024` as numbers."""
    accepted: dict[type, Any] = {bool: bool, Path: str | int | Path, str: str | int | float | Path}
    if not isinstance(value, accepted[kind]) or (isinstance(value, bool) and kind is not bool):
        wanted = {bool: "true or false", Path: "a path", str: "text"}
        raise InputError(f"{name} {shown(value)}: give {wanted[kind]}")
    return kind(str(value)) if kind is Path else kind(value)


def _converted_tuple(arguments: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    """A tuple of any length (`tuple[str, ...]`, where one value stands for itself) or of a fixed one."""
    if isinstance(value, str) and arguments[-1] is not Ellipsis:
        value = value.split()
    parts = list(value) if isinstance(value, list | tuple) else [value]
    if arguments[-1] is Ellipsis:
        return tuple(converted(arguments[0], part, name) for part in parts)
    if len(parts) != len(arguments):
        raise InputError(f"{name} {' '.join(map(shown, parts))}: give {len(arguments)} values")
    return tuple(converted(hint, part, name) for hint, part in zip(arguments, parts, strict=True))


def _converted_number(kind: type, value: Any, name: str) -> int | float:
    try:
        if isinstance(value, bool) or not isinstance(value, str | Real):
            raise ValueError
        if kind is float:
            return float(value)
        if not isinstance(value, str | Integral):  # 3.0 may be meant as 3, but 3.5 can't be
            raise ValueError
        return int(value)
    except (ValueError, OverflowError):
        raise InputError(f"{name} {shown(value)}: give a {'whole number' if kind is int else 'number'}") from None


def _check_range(span: Range | None, number: Any, name: str) -> None:
    numbers = number if isinstance(number, tuple) else () if number is None or isinstance(number, str) else (number,)
    if span is not None and not all(span.holds(each) for each in numbers):
        raise InputError(f"{name} {' '.join(map(shown, numbers))}: give {span}")


def shown(value: Any) -> str:
    """A value for a message: the start of a long one."""
    try:
        text = str(value)
    except ValueError:  # Python writes no number of thousands of digits
        return f"{type(value).__name__} of thousands of digits"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def numbers(kind: Any, text: str, name: str) -> tuple[Any, ...]:
    """Numbers that an option has as text, with commas between them.

    Args:
        kind: type of each, with its range.
        text: `1,0.5`.
        name: the option's name, for messages.

    Raises:
        InputError: something else.
    """
    return tuple(converted(kind, word, name) for word in text.split(","))


def range_of(hint: Any) -> Range | None:
    """The range in an annotation."""
    return next((part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Range)), None)


def label(kind: Any, name: str) -> str:
    """How messages name an option: `--batch-size`, or STORE for a positional argument."""
    option = next(option for option in fields(kind) if option.name == name)
    return option.metadata.get("metavar", name.upper()) if option.default is MISSING else flag(name)


def placeholder(hint: Any, name: str) -> Any:
    """Stands for a positional argument that --print-config leaves out: STORE, say."""
    return get_args(hint)[0] if get_origin(hint) is Literal else name.upper()


def flag(name: str) -> str:
    """The flag of an option."""
    return f"--{name.replace('_', '-')}"


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The options in a file.

    Raises:
        InputError: no such file, or it holds something else.
        OSError: it can't be read.
    """
    try:
        values = documents.read_yaml(path, way_out=OPTION_LINES) or {}
    except FileNotFoundError:
        raise InputError(f"{path}: does not exist; give a YAML file of options") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{path}: holds something else than options; {OPTION_LINES}")
    return values


def _by_name(kind: Any, source: str, layer: Mapping[str, Any]) -> dict[str, Any]:
    """The layer with its keys as field names (`batch-size` -> `batch_size`)."""
    known = [option.name for option in fields(kind)]
    if source:
        known = [name for name in known if name not in CALLER_ONLY]
    for key in layer:
        if key.replace("-", "_") not in known:
            prefix = f"{source}: " if source else ""
            raise InputError(f"{prefix}no option '{shown(key)}'{near(key.replace('-', '_'), known)}")
    return {key.replace("-", "_"): value for key, value in layer.items()}


def near(name: Any, known: Sequence[Any]) -> str:
    """`; did you mean 'batch_size'?` for a misspelt name, or nothing."""
    close = difflib.get_close_matches(shown(name), [str(one) for one in known], 1)
    return f"; did you mean {close[0]!r}?" if close else ""

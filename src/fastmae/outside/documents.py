"""Reading JSON, JSON lines and YAML: bounded in size and depth, and of the type that the caller names.

msgspec checks the types while it reads: a key that the type does not have is skipped and costs no memory, and an error
says where in the document it is.
"""

import json
import re
from pathlib import Path
from typing import Any, TypeVar, overload

import msgspec
import yaml

from fastmae.errors import InputError, first_line
from fastmae.outside.regular_file import read_bounded

Value = TypeVar("Value")

LARGEST_JSON = 64 << 20
"""Most bytes of a JSON document, unless the caller allows more."""
LARGEST_YAML = 1 << 20
"""Most bytes of a YAML document: people write them."""
SHOWN_BYTES = 16
"""Before and after the place that a message names."""


@overload
def read_json(path: Path, kind: type[Value], *, way_out: str, limit: int = ...) -> Value: ...
@overload
def read_json(path: Path, kind: Any = Any, *, way_out: str, limit: int = ...) -> Any: ...
def read_json(path: Path, kind: Any = Any, *, way_out: str, limit: int = LARGEST_JSON) -> Any:
    """Read a JSON file.

    Args:
        path: of the file.
        kind: type of the document: `dict[str, int]`, a dataclass, a `msgspec.Struct`, with `msgspec.Meta` for ranges.
        way_out: what the user can do if the file is no such document; ends the message.
        limit: most bytes that the file may have.

    Raises:
        InputError: not JSON, not of this type, nested too deeply, or too large.
        OSError: the file can't be read.
    """
    return parse_json(read_bounded(path, limit), kind, name=path, way_out=way_out)


def parse_json(data: bytes | str, kind: Any = Any, *, name: object, way_out: str) -> Any:
    """Parse a JSON document; `name` is what messages call it. Otherwise as `read_json`."""
    try:
        return _decoded(data, kind)
    except (msgspec.DecodeError, UnicodeError, ValueError, RecursionError, OverflowError) as error:
        raise InputError(f"{name}: {_cause(error, 'JSON')}{_place(error, data)}; {way_out}") from None


def checked(value: Any, kind: Any, *, name: object, way_out: str) -> Any:
    """A value that was read already (from a checkpoint, say) as one of this type. Arguments: as `parse_json`.

    Raises:
        InputError: it is not of this type.
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, ValueError, RecursionError, OverflowError) as error:
        raise InputError(f"{name}: {_cause(error, 'JSON')}; {way_out}") from None


def read_json_lines(path: Path, kind: Any = Any, *, limit: int = LARGEST_JSON) -> tuple[list[Any], int]:
    """The lines of a log, one JSON document each.

    A log is never worth more than what it tells of: lines that can't be read are left out and counted. A last line
    without an end, which a kill may leave, is neither read nor counted.

    Returns:
        The documents in their order, and the number of lines that are not of this type.

    Raises:
        InputError: a larger file than `limit`, or none that is regular.
        OSError: the file can't be read.
    """
    *lines, _ = read_bounded(path, limit).split(b"\n")
    decoder, documents = msgspec.json.Decoder(kind), []
    for line in lines:
        try:
            documents.append(decoder.decode(line))
        except (msgspec.DecodeError, UnicodeError, ValueError, RecursionError, OverflowError):
            continue
    return documents, len(lines) - len(documents)


def read_yaml(path: Path, *, way_out: str, limit: int = LARGEST_YAML) -> Any:
    """Read a YAML file. Keys that are given twice, and aliases (`*name`), are refused.

    A few aliases of aliases stand for gigabytes as soon as something walks through them; and of two equal keys YAML
    takes the last one without a word.

    Raises:
        InputError: not such YAML, nested too deeply, or too large.
        OSError: the file can't be read.
    """
    return parse_yaml(read_bounded(path, limit), name=path, way_out=way_out)


def parse_yaml(data: bytes | str, *, name: object, way_out: str) -> Any:
    """Parse a YAML document; `name` is what messages call it. Otherwise as `read_yaml`."""
    try:
        return yaml.load(data, _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise InputError(f"{name}: {_cause(error, 'YAML')}; {way_out}") from None


class _PlainLoader(yaml.SafeLoader):
    """Values alone: no aliases, no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node, unless it is an alias."""
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"an alias (*{event.anchor}); write the values out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A mapping, unless two of its keys are the same."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _place(error: Exception, data: bytes | str) -> str:
    """`, near '"area": NaN'`: what is not JSON, in a document that may have millions of characters."""
    position = re.search(r"\(byte (\d+)\)", str(error))
    if position is None:
        return ""
    encoded, byte = data.encode("utf-8", "replace") if isinstance(data, str) else data, int(position[1])
    return f", near {encoded[max(0, byte - SHOWN_BYTES) : byte + SHOWN_BYTES].decode('utf-8', 'replace')!r}"


def _decoded(data: bytes | str, kind: Any) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        # Python writes the bytes of a file name that are not UTF-8 as lone surrogates, which msgspec does not read.
        text = data if isinstance(data, str) else data.decode()
        if not re.search(r"\\ud[c-f]", text, re.IGNORECASE):
            raise
        return msgspec.convert(json.loads(text, parse_constant=_no_constant), kind)


def _no_constant(name: str) -> float:
    """NaN and Infinity, which Python would read."""
    raise ValueError(f"{name} is no number of JSON")


def _cause(error: Exception, language: str) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, msgspec.ValidationError):
        return f"not as it should be ({first_line(error)})"
    return f"not {language} ({' '.join(str(error).split())[:160]})"

"""A small safetensors file of a store: the statistics, or what a codec has learnt. All of its tensors are float32."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fastmae.errors import InputError
from fastmae.outside.regular_file import read_bounded
from fastmae.outside.tensors import LENGTH_BYTES
from fastmae.tokens.shard_header import data_problem, mapped_tensors, parse_header

LONGEST_HEADER = 1 << 16
"""Most bytes of the file's header."""
WAY_OUT = "`fastmae verify STORE --repair` brings it back"


def load_tensors(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Read a small safetensors file.

    Args:
        file: the file.
        shapes: shape of each tensor that it must hold, by name. It may hold no others.

    Raises:
        InputError: missing, damaged, or with other tensors.
    """
    try:
        data = read_bounded(file, largest_file(shapes))
    except OSError as error:
        raise InputError(f"{file}: missing or damaged ({error.strerror}); {WAY_OUT}") from error
    header_bytes = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    entries, _ = parse_header(data[:header_bytes], file)
    problem = data_problem(entries, header_bytes, len(data))
    if problem is None and {name: entry.shape for name, entry in entries.items()} != dict(shapes):
        problem = f"does not hold just {', '.join(f'{name} {list(shape)}' for name, shape in shapes.items())}"
    if problem is None and {entry.dtype for entry in entries.values()} != {"F32"}:
        problem = "holds other numbers than float32"
    if problem is not None:
        raise InputError(f"{file}: {problem}; {WAY_OUT}")
    return mapped_tensors(np.frombuffer(bytearray(data), np.uint8)[header_bytes:], entries)


def largest_file(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Most bytes of a file of float32 tensors of these shapes."""
    return LONGEST_HEADER + 4 * sum(math.prod(shape) for shape in shapes.values())

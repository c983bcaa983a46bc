"""Writing a safetensors file from tensors that lie in memory in parts, without a copy of their bytes.

safetensors' own `save` wants each tensor in one piece and returns the whole file as one more copy. The bytes written
here are the same.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

DTYPE_NAMES = {
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "uint8": "U8",
}
"""safetensors' names of the dtypes that a shard holds, in the order in which it writes tensors of these dtypes."""
ALIGNMENT = 8
"""The header is padded with spaces to a multiple of it, in bytes."""


@dataclass(frozen=True)
class SplitTensor:
    """A tensor in parts, which follow each other along the first dimension.

    Attributes:
        parts: contiguous arrays that differ in their first dimension only, at least one.
    """

    parts: Sequence[np.ndarray]

    @classmethod
    def of(cls, parts: Sequence[torch.Tensor]) -> "SplitTensor":
        """From tensors on the CPU."""
        return cls([part.contiguous().numpy() for part in parts])

    @property
    def shape(self) -> list[int]:
        """Shape of the whole tensor."""
        return [sum(len(part) for part in self.parts), *self.parts[0].shape[1:]]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of all parts."""
        return self.parts[0].dtype

    @property
    def size(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self) -> Iterator[np.ndarray]:
        """The entries along the first dimension."""
        for part in self.parts:
            yield from part

    @cached_property
    def checksum(self) -> str:
        """xxh3-64 of the bytes, as 16 hex digits; the same as `format.checksum` of the tensor in one piece."""
        digest = xxhash.xxh3_64()
        for part in self.parts:
            digest.update(as_bytes(part))
        return digest.hexdigest()

    def digested_rows(self) -> Iterator[np.ndarray]:
        """Like `rows`; `checksum` is computed on the way, while each row is in the core's cache."""
        digest = xxhash.xxh3_64()
        for row in self.rows():
            yield row
            digest.update(as_bytes(row))
        self.__dict__["checksum"] = digest.hexdigest()


def as_bytes(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def write_tensors(path: Path, tensors: Mapping[str, SplitTensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file.

    Args:
        path: the file.
        tensors: by name, of the dtypes in `DTYPE_NAMES`.
        metadata: one key at most, as safetensors keeps no order among several; in ASCII.
    """
    order = list(DTYPE_NAMES)
    names = sorted(tensors, key=lambda name: (order.index(str(tensors[name].dtype)), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.size
        dtype = DTYPE_NAMES[str(tensor.dtype)]
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for part in tensors[name].parts:
                file.write(as_bytes(part))

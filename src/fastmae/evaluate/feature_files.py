"""Feature files, written row by row: memory holds one batch, however many images there are.

.safetensors holds `embeddings` [n, D]; with --dense also `dense` [n, g, g, D]; and `paths`, uint8: the images' keys in
UTF-8, separated by zero bytes (no key contains one). As a tensor, a million names cost nothing until they are read,
while every reader would have to parse them if they were metadata:

    tensors = safetensors.numpy.load_file(file)
    paths = tensors["paths"].tobytes().decode().split("\\0")

.parquet holds one row per image: `path`, and `embedding`, a list of floats.
Both say in JSON, under the metadata key `fastmae`, how they were made.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastmae.outside.tensors import LENGTH_BYTES

METADATA_KEY = "fastmae"
DTYPES: dict[str, type[np.floating]] = {"fp32": np.float32, "fp16": np.float16}
SAFETENSORS_DTYPES = {"fp32": "F32", "fp16": "F16"}
ROW_GROUP = 4096
"""Rows of a Parquet file that are written together."""
LARGEST_SIZE = 1 << 60
"""More bytes than any file has: a header that contains this number is as long as a header gets."""


class FeatureFile(Protocol):
    """A file that takes rows."""

    def add(self, keys: Sequence[str], embeddings: np.ndarray, dense: np.ndarray | None) -> None:
        """Append rows.

        Args:
            keys: b keys.
            embeddings: [b, D].
            dense: [b, g, g, D], or None without a grid.
        """
        ...

    def close(self) -> None:
        """Finish the file."""
        ...


def open_feature_file(
    path: Path, suffix: str, rows: int, dim: int, grid: int | None, dtype: str, metadata: dict[str, Any]
) -> FeatureFile:
    """Begin a file.

    Args:
        path: the file to write.
        suffix: .safetensors or .parquet.
        rows: the largest number of rows.
        dim: D.
        grid: g, or None without a grid.
        dtype: a key of `DTYPES`.
        metadata: how the features were made, JSON-able.
    """
    if suffix == ".parquet":
        return ParquetFeatures(path, dtype, metadata)
    return SafetensorsFeatures(path, rows, dim, grid, dtype, metadata)


class SafetensorsFeatures:
    """A safetensors file that grows: rows of the largest tensor go into it directly, the others wait in unnamed files.

    Args:
        path: the file to write.
        rows: the largest number of rows. Space is reserved for a header of that many: their number is known at the end.
        dim: D.
        grid: g, or None without a grid.
        dtype: a key of `DTYPES`.
        metadata: how the features were made, JSON-able.
    """

    def __init__(self, path: Path, rows: int, dim: int, grid: int | None, dtype: str, metadata: dict[str, Any]):
        self.dim, self.grid, self.dtype, self.metadata = dim, grid, dtype, metadata
        self.rows = self.path_bytes = 0
        self.header_bytes = -(-len(self._header(rows, LARGEST_SIZE)) // LENGTH_BYTES) * LENGTH_BYTES
        self.paths: BinaryIO = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - `close` closes it
        self.vectors: BinaryIO | None = tempfile.TemporaryFile(dir=path.parent) if grid else None  # noqa: SIM115 - the same
        self.file = path.open("wb")
        self.file.seek(LENGTH_BYTES + self.header_bytes)

    def add(self, keys: Sequence[str], embeddings: np.ndarray, dense: np.ndarray | None) -> None:
        """As `FeatureFile`."""
        kind = DTYPES[self.dtype]
        if self.vectors is not None:
            assert dense is not None
            self.file.write(np.ascontiguousarray(dense, kind).data)
        (self.vectors or self.file).write(np.ascontiguousarray(embeddings, kind).data)
        names = b"\0".join(key.encode("utf-8", "surrogateescape") for key in keys)
        self.path_bytes += self.paths.write(b"\0" + names if self.rows else names)
        self.rows += len(keys)

    def close(self) -> None:
        """As `FeatureFile`."""
        for waiting in (self.vectors, self.paths):
            if waiting is not None:
                waiting.seek(0)
                shutil.copyfileobj(waiting, self.file)
                waiting.close()
        header = self._header(self.rows, self.path_bytes).ljust(self.header_bytes)
        self.file.seek(0)
        self.file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
        self.file.close()

    def _header(self, rows: int, path_bytes: int) -> bytes:
        shapes = {"dense": [rows, self.grid, self.grid, self.dim]} if self.grid else {}
        shapes["embeddings"] = [rows, self.dim]
        header: dict[str, Any] = {"__metadata__": {METADATA_KEY: json.dumps(self.metadata)}}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + int(np.prod(shape)) * np.dtype(DTYPES[self.dtype]).itemsize
            header[name] = {"dtype": SAFETENSORS_DTYPES[self.dtype], "shape": shape, "data_offsets": [start, end]}
        header["paths"] = {"dtype": "U8", "shape": [path_bytes], "data_offsets": [end, end + path_bytes]}
        return json.dumps(header).encode()


class ParquetFeatures:
    """A Parquet file, written one row group at a time.

    Args:
        path: the file to write.
        dtype: a key of `DTYPES`.
        metadata: how the features were made, JSON-able.
    """

    def __init__(self, path: Path, dtype: str, metadata: dict[str, Any]):
        self.kind = DTYPES[dtype]
        fields = [("path", pa.string()), ("embedding", pa.list_(pa.from_numpy_dtype(self.kind)))]
        self.schema = pa.schema(fields, metadata={METADATA_KEY: json.dumps(metadata)})
        self.writer = pq.ParquetWriter(path, self.schema)
        self.keys: list[str] = []
        self.embeddings: list[np.ndarray] = []

    def add(self, keys: Sequence[str], embeddings: np.ndarray, dense: np.ndarray | None) -> None:
        """As `FeatureFile`; bytes of a key that are not UTF-8 become \\xNN."""
        assert dense is None
        self.keys += [key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for key in keys]
        self.embeddings.append(embeddings.astype(self.kind))
        if len(self.keys) >= ROW_GROUP:
            self._write()

    def close(self) -> None:
        """As `FeatureFile`."""
        if self.keys:
            self._write()
        self.writer.close()

    def _write(self) -> None:
        values = np.concatenate(self.embeddings)
        ends = pa.array(np.arange(0, values.size + 1, values.shape[1], dtype=np.int32))
        lists = pa.ListArray.from_arrays(ends, pa.array(values.reshape(-1)))
        self.writer.write_table(pa.table([pa.array(self.keys, pa.string()), lists], schema=self.schema))
        self.keys, self.embeddings = [], []

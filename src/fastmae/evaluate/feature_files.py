"""Embeddings on disk, row by row as they come: memory holds a batch, however many images there are.

.safetensors holds `embeddings` [n, D], with --dense also `dense` [n, g, g, D], both of one dtype, and `paths`: uint8, the images'
keys in UTF-8 with a zero byte between two (no key holds one). So a million names are a tensor, and not metadata, which every
reader would have to parse first:

    tensors = safetensors.numpy.load_file(file)
    paths = tensors["paths"].tobytes().decode().split("\\0")

.parquet holds a row an image: `path`, and `embedding`, a list of floats.
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

from fastmae.errors import InputError

METADATA_KEY = "fastmae"
SUFFIXES = (".safetensors", ".parquet")
DTYPES: dict[str, type[np.floating]] = {"fp32": np.float32, "fp16": np.float16}
NAMES = {"fp32": "F32", "fp16": "F16"}
"""As safetensors call them."""
ROW_GROUP = 4096
"""Rows of a Parquet file that are written, and read, together."""
LENGTH_BYTES = 8
"""In which a safetensors file says how long its header is."""
LONGEST = 1 << 60
"""More bytes than a file has: a header written with it is as long as headers get."""


class EmbeddingFile(Protocol):
    """Takes rows; closed, it is a file."""

    def add(self, keys: Sequence[str], embeddings: np.ndarray, dense: np.ndarray | None) -> None:
        """Append rows: keys, [b, D], and [b, g, g, D] where there is a grid."""
        ...

    def close(self) -> None:
        """Finish the file."""
        ...


def open_embeddings(
    path: Path, suffix: str, rows: int, dim: int, grid: int | None, dtype: str, made: dict[str, Any]
) -> EmbeddingFile:
    """Begin a file.

    Args:
        path: to write to.
        suffix: one of `SUFFIXES`.
        rows: at most.
        dim: D.
        grid: g, or None without a grid.
        dtype: a key of `DTYPES`.
        made: how, for the metadata.
    """
    if suffix == ".parquet":
        return ParquetEmbeddings(path, dtype, made)
    return SafetensorsEmbeddings(path, rows, dim, grid, dtype, made)


def check_file(out: Path, dense: bool) -> None:
    """Whether embeddings can be written to a file of this name.

    Raises:
        InputError: another kind of file, a folder, or a grid for Parquet.
    """
    if out.suffix not in SUFFIXES:
        raise InputError(f"{out}: give a file that ends in {' or '.join(SUFFIXES)}")
    if out.is_dir():
        raise InputError(f"{out}: is a folder; give a file in it")
    if dense and out.suffix == ".parquet":
        raise InputError(
            f"{out}: --dense is a grid of vectors an image, which a table holds badly; give a .safetensors file"
        )


class SafetensorsEmbeddings:
    """A safetensors file that grows: the largest tensor lies first and takes its rows in place, the others wait in files without a name.

    Args:
        path: to write to.
        rows: at most; the header's place is kept for that many, since how many can be decoded is known at the end.
        dim: D.
        grid: g, or None without a grid.
        dtype: a key of `DTYPES`.
        made: how, for the metadata.
    """

    def __init__(self, path: Path, rows: int, dim: int, grid: int | None, dtype: str, made: dict[str, Any]):
        self.dim, self.grid, self.dtype, self.made = dim, grid, dtype, made
        self.rows = self.path_bytes = 0
        self.header_bytes = -(-len(self._header(rows, LONGEST)) // LENGTH_BYTES) * LENGTH_BYTES
        self.paths: BinaryIO = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - closed by `close`, or gone with the process
        self.vectors: BinaryIO | None = tempfile.TemporaryFile(dir=path.parent) if grid else None  # noqa: SIM115
        self.file = path.open("wb")
        self.file.seek(LENGTH_BYTES + self.header_bytes)

    def add(self, keys: Sequence[str], embeddings: np.ndarray, dense: np.ndarray | None) -> None:
        """As `EmbeddingFile`."""
        kind = DTYPES[self.dtype]
        if self.vectors is not None:
            assert dense is not None
            self.file.write(np.ascontiguousarray(dense, kind).data)
        (self.vectors or self.file).write(np.ascontiguousarray(embeddings, kind).data)
        names = b"\0".join(key.encode("utf-8", "surrogateescape") for key in keys)
        self.path_bytes += self.paths.write(b"\0" + names if self.rows else names)
        self.rows += len(keys)

    def close(self) -> None:
        """As `EmbeddingFile`."""
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
        header: dict[str, Any] = {"__metadata__": {METADATA_KEY: json.dumps(self.made)}}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + int(np.prod(shape)) * np.dtype(DTYPES[self.dtype]).itemsize
            header[name] = {"dtype": NAMES[self.dtype], "shape": shape, "data_offsets": [start, end]}
        header["paths"] = {"dtype": "U8", "shape": [path_bytes], "data_offsets": [end, end + path_bytes]}
        return json.dumps(header).encode()


class ParquetEmbeddings:
    """A Parquet file, a row group at a time.

    Args:
        path: to write to.
        dtype: a key of `DTYPES`.
        made: how, for the metadata.
    """

    def __init__(self, path: Path, dtype: str, made: dict[str, Any]):
        self.kind = DTYPES[dtype]
        fields = [("path", pa.string()), ("embedding", pa.list_(pa.from_numpy_dtype(self.kind)))]
        self.schema = pa.schema(fields, metadata={METADATA_KEY: json.dumps(made)})
        self.writer = pq.ParquetWriter(path, self.schema)
        self.keys: list[str] = []
        self.embeddings: list[np.ndarray] = []

    def add(self, keys: Sequence[str], embeddings: np.ndarray, dense: np.ndarray | None) -> None:
        """As `EmbeddingFile`; a name that is no UTF-8 has its bytes as \\xNN."""
        assert dense is None
        self.keys += [key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for key in keys]
        self.embeddings.append(embeddings.astype(self.kind))
        if len(self.keys) >= ROW_GROUP:
            self._write()

    def close(self) -> None:
        """As `EmbeddingFile`."""
        if self.keys:
            self._write()
        self.writer.close()

    def _write(self) -> None:
        values = np.concatenate(self.embeddings)
        ends = pa.array(np.arange(0, values.size + 1, values.shape[1], dtype=np.int32))
        lists = pa.ListArray.from_arrays(ends, pa.array(values.reshape(-1)))
        self.writer.write_table(pa.table([pa.array(self.keys, pa.string()), lists], schema=self.schema))
        self.keys, self.embeddings = [], []

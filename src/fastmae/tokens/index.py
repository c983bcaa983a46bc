"""The index of a store (`index.parquet`): a row for each image. Read without unfolding more than a store can hold.

A few bytes of Parquet can stand for gigabytes: compressed blocks, runs of one value, one long text that many rows name.
So an index is read only if it is compressed as the writer does it, has the columns and as many rows as the store has
images, and no more rows than bytes: each row has a key of its own, which takes some. Columns of text stay
dictionary-encoded, each value once.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from fastmae.errors import InputError, first_line
from fastmae.images.entries import label_of
from fastmae.outside.regular_file import open_regular
from fastmae.runtime.wording import counted
from fastmae.tokens.format import INDEX_SCHEMA, StoreInfo
from fastmae.tokens.shard_header import ImageRecord

COMPRESSIONS = {"SNAPPY", "UNCOMPRESSED"}
"""What the writer uses, and what Parquet falls back to. Snappy makes at most some 20 bytes of one."""
BATCH_ROWS = 1 << 12
"""Rows that are unfolded at a time where the index is compared with the shards."""
WAY_OUT = "`fastmae verify STORE --repair` makes it again"
_TEXTS = [field.name for field in INDEX_SCHEMA if field.type == pa.string()]
_ERRORS = (OSError, pa.ArrowException, ValueError, OverflowError, KeyError)  # KeyError: a column is not there


def read_index(path: Path, info: StoreInfo, columns: Sequence[str]) -> pa.Table:
    """Some columns of an index, on this thread alone: pyarrow 26's own abort one process in five at its end.

    Args:
        path: the index.
        info: what the store holds.
        columns: names of the columns.

    Returns:
        A row for each image of the lists, skipped ones included; texts are dictionary-encoded.

    Raises:
        InputError: missing, damaged, or not an index of this store.
    """
    try:
        with open_regular(path) as opened:  # opened here, as pyarrow takes no path that is not UTF-8
            table = _checked(opened, path, info).read(columns=list(columns), use_threads=False)
    except _ERRORS as error:
        raise _as_input_error(path, error) from error
    if any(column.null_count for column in table.columns):
        raise InputError(f"{path}: has rows without values; {WAY_OUT}")
    return table


def read_rows(path: Path, info: StoreInfo) -> Iterator[pa.Table]:
    """The whole index, `BATCH_ROWS` rows or fewer at a time. Raises as `read_index`."""
    try:
        with open_regular(path) as opened:
            file = _checked(opened, path, info)
            for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
                yield pa.Table.from_batches([batch])
    except _ERRORS as error:
        raise _as_input_error(path, error) from error


def decoded_rows(path: Path, info: StoreInfo) -> tuple[np.ndarray, np.ndarray]:
    """The shard and the row of each image of the lists, int32 [images]; the row of a skipped image is -1.

    Raises:
        InputError: as `read_index`, or shards and rows that can't exist.
    """
    table = read_index(path, info, ["shard", "row"])
    # Not `to_numpy`, which imports pandas where it is installed.
    shard, row = (np.from_dlpack(table[name].combine_chunks()) for name in ("shard", "row"))
    if not ((shard >= 0) & (shard < info.shards) & (row >= -1) & (row < info.shard_size)).all():
        raise InputError(f"{path}: names shards or rows that can't exist; {WAY_OUT}")
    if not (row >= 0).any():
        raise InputError(f"{path}: lists no image that could be decoded; {WAY_OUT}")
    return shard, row


def index_rows(images: Sequence[ImageRecord], shards: Sequence[int]) -> pa.Table:
    """Rows of the index, given the images and the shard of each."""
    columns = {
        "path": [_as_utf8(image.path) for image in images],
        "label": [_as_utf8(label_of(image.path)) for image in images],
        "shard": shards,
        **{name: [getattr(image, name) for image in images] for name in ("row", "width", "height", "status")},
    }
    return pa.table(columns, schema=INDEX_SCHEMA)


class IndexComparison:
    """Compares an index with the shards, in their order.

    Args:
        path: the index.
        info: what the store holds.

    Attributes:
        problem: the first difference, in one line; None if there is none.
    """

    def __init__(self, path: Path, info: StoreInfo):
        self.problem: str | None = None
        self._path, self._rows, self._left = path, read_rows(path, info), INDEX_SCHEMA.empty_table()

    def compare(self, shard: int, images: Sequence[ImageRecord] | None, count: int) -> None:
        """Compare the next rows.

        Args:
            shard: number of the shard that they are about.
            images: the shard's images; None if the shard is damaged, and its rows are passed over.
            count: number of these images.
        """
        position = 0
        while position < count and self.problem is None:
            try:
                table = self._left if len(self._left) else next(self._rows)
            except StopIteration:
                self.problem = "ends before the last image"
                return
            except InputError as error:
                self.problem = str(error).removeprefix(f"{self._path}: ")
                return
            taken = min(len(table), count - position)
            rows, self._left = table.slice(0, taken), table.slice(taken)
            if images is not None and not _same(rows, index_rows(images[position : position + taken], [shard] * taken)):
                self.problem = f"does not hold the images of shard {shard} as the shard does; {WAY_OUT}"
            position += taken


def _checked(opened: IO[bytes], path: Path, info: StoreInfo) -> pq.ParquetFile:
    """The index, once what it declares is what this store's index can have."""
    size = opened.seek(0, 2)
    opened.seek(0)
    file = pq.ParquetFile(opened, read_dictionary=_TEXTS)
    if [(field.name, field.type) for field in file.schema_arrow] != [
        (field.name, pa.dictionary(pa.int32(), pa.string()) if field.name in _TEXTS else field.type)
        for field in INDEX_SCHEMA
    ]:
        raise InputError(f"{path}: not this store's index; {WAY_OUT}")
    metadata = file.metadata
    if metadata.num_rows != info.images:
        listed = f"lists {counted(metadata.num_rows, 'image')}, store.json {info.images}"
        raise InputError(f"{path}: {listed}; {WAY_OUT}")
    chunks = [
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    if info.images > size or not {chunk.compression for chunk in chunks} <= COMPRESSIONS:
        raise InputError(f"{path}: would unfold to more than an index of {size / 1e6:.4g} MB can hold; {WAY_OUT}")
    return file


def _same(rows: pa.Table, expected: pa.Table) -> bool:
    """Whether rows of an index are the expected ones. A text is unfolded only where its length is right."""
    for name in INDEX_SCHEMA.names:
        actual = rows[name].combine_chunks()
        if isinstance(actual, pa.DictionaryArray):
            if _bytes_of(actual) != pa.compute.sum(pa.compute.binary_length(expected[name])).as_py():
                return False
            actual = actual.dictionary_decode()
        if not actual.equals(expected[name].combine_chunks()):
            return False
    return True


def _bytes_of(texts: pa.DictionaryArray) -> int | None:
    """Bytes that dictionary-encoded texts take, each written out."""
    lengths = pa.compute.binary_length(texts.dictionary)
    return pa.compute.sum(lengths.take(texts.indices).cast(pa.int64())).as_py()


def _as_utf8(path: str) -> str:
    """The path, with \\x escapes for bytes that are not UTF-8: the index is for people, shards keep the bytes."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _as_input_error(path: Path, error: Exception) -> InputError:
    if isinstance(error, InputError):
        return error
    return InputError(f"{path}: missing or damaged ({first_line(error)}); {WAY_OUT}")

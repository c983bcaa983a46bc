"""A list of image paths as a source: .txt with a path a line, or a column of .csv, .tsv or .parquet. Read as a stream, never whole."""

import csv
import os
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, AnyStr, BinaryIO, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from fastmae.errors import InputError, first_line
from fastmae.images.entries import entry_of, key_of
from fastmae.images.folders import is_named_as_image

LIST_SUFFIXES = frozenset([".txt", ".csv", ".tsv", ".parquet"])
PATH_COLUMNS = ("path", "image", "file", "filename", "file_name")
"""What the column of paths is called, in small or capital letters."""
LONGEST_LINE = 1 << 20
"""Bytes or letters, other columns with it. A file without line ends must not be read into memory."""
BATCH_ROWS, BATCH_BYTES = 1 << 16, 1 << 20
"""Rows of .parquet at a time, and how far it is read ahead."""


@dataclass(frozen=True)
class ListSource:
    """The images that a file lists; a key is the path as it is written there. Relative paths start from the file's folder."""

    path: Path
    kind: ClassVar[str] = "list"

    def entries(self) -> Iterator[bytes]:
        """An entry a path, in the file's order.

        Raises:
            InputError: no column of paths, or which one is not clear; a row without a path; a damaged file.
        """
        read: dict[str, Callable[[Path], Iterator[Any]]]
        read = {".txt": _lines, ".csv": _csv_column, ".tsv": _csv_column, ".parquet": _parquet_column}
        return (entry_of(self.path, key) for key in read[self.path.suffix.lower()](self.path))

    def open(self, entry: bytes) -> BinaryIO:
        """Open an image's file.

        Raises:
            OSError: the file can't be opened.
        """
        return (self.path.parent / key_of(entry)).open("rb")


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of text; blank ones and those that start with # are comments."""
    with path.open("rb") as file:
        if file.read(len(BOM_UTF8)) != BOM_UTF8:  # a mark that some editors put first
            file.seek(0)
        for line in _short_lines(path, file):
            text = line.rstrip(b"\r\n")
            if text.strip() and not text.startswith(b"#"):
                yield text


def _short_lines(path: Path, file: IO[AnyStr]) -> Iterator[AnyStr]:
    """The lines of a file that has any."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise InputError(
                f"{path}: line {number} is too long for a list of paths; is it text with one image a line?"
            )
        yield line


def _csv_column(path: Path) -> Iterator[str]:
    """The column of paths of a .csv or .tsv, with a line of names above it or without."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(_short_lines(path, file), delimiter=delimiter)
        try:
            first = next((row for row in rows if row), [])
            column = _column_among(path, [name.strip() for name in first])
            if column is None:
                column, names_above = _column_without_names(path, first), []
            else:
                names_above, first = first, []
            for row in chain([first], rows):
                if row and (len(row) <= column or not row[column].strip()):
                    where = f"column '{names_above[column]}'" if names_above else "the first column"
                    raise InputError(f"{path}: line {rows.line_num} has no path in {where}; fill or remove it")
                if row:
                    yield row[column]
        except csv.Error as error:
            raise InputError(
                f"{path}: line {rows.line_num} is not {path.suffix[1:]}: {first_line(error)}; repair it"
            ) from error


def _column_without_names(path: Path, first: list[str]) -> int:
    """0 when the first row looks like data that start with a path."""
    if not first or is_named_as_image(first[0]) or os.path.isfile(path.parent / first[0]):  # noqa: PTH113 - for any text at all
        return 0
    raise InputError(
        f"{path}: no column is called {_column_names()}, and its first line starts with {first[0][:80]!r}, which is no image; "
        "name the column of paths 'path'"
    )


def _parquet_column(path: Path) -> Iterator[str | bytes]:
    """The column of paths of a .parquet file."""
    try:
        with path.open("rb") as raw, pq.ParquetFile(raw, buffer_size=BATCH_BYTES) as file:
            schema = file.schema_arrow
            column = _column_among(path, schema.names)
            if column is None:
                raise InputError(
                    f"{path}: no column is called {_column_names()} (there are {_some(schema.names)}); rename the one of paths"
                )
            name, kind = schema.names[column], schema.field(column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if str(kind).removeprefix("large_").removesuffix("_view") not in ("string", "binary"):
                raise InputError(
                    f"{path}: column '{name}' holds {str(kind)[:80]}, not paths; for images in the table itself, "
                    "load it with `datasets` and give the folder that save_to_disk writes"
                )
            batches = file.iter_batches(BATCH_ROWS, columns=[name], use_threads=False)
            keys = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            for row, key in enumerate(keys):
                if not key or not key.strip():
                    raise InputError(f"{path}: row {row} has no path in column '{name}'; fill or remove it")
                yield key
    except InputError:
        raise
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the file's
            raise
        raise InputError(f"{path}: can't be read as .parquet ({first_line(error)}); write it again") from error


def _column_among(path: Path, names: Sequence[str]) -> int | None:
    """Place of the column of paths, or None when no column is called like one."""
    found = [place for place, name in enumerate(names) if name.lower() in PATH_COLUMNS]
    if len(found) > 1:
        raise InputError(
            f"{path}: which column holds the paths, {_some([names[place] for place in found])}? Rename or remove all but one"
        )
    return found[0] if found else None


def _column_names() -> str:
    return f"{', '.join(PATH_COLUMNS[:-1])} or {PATH_COLUMNS[-1]}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:8])
    return f"{shown}, ..." if len(names) > 8 else shown

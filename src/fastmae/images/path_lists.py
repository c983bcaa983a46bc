"""A list of image paths as a source: a .txt with one path a line, or one column of a .csv, .tsv or .parquet.

The list is read as a stream, never whole.
"""

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
from fastmae.outside.regular_file import open_regular

LIST_SUFFIXES = frozenset([".txt", ".csv", ".tsv", ".parquet"])
PATH_COLUMNS = ("path", "image", "file", "filename", "file_name")
"""Names of the column of paths, in upper or lower case."""
LONGEST_LINE = 1 << 20
"""Longest line, all columns included, in bytes or characters. A file without line ends must not fill the memory."""
BATCH_ROWS, READ_AHEAD_BYTES = 1 << 16, 1 << 20
"""Rows of a .parquet that are decoded at a time, and the buffer that it is read through."""


@dataclass(frozen=True)
class ListSource:
    """The images that a file lists; a key is the path as written there. Relative paths start at the file's folder."""

    path: Path
    kind: ClassVar[str] = "list"

    def entries(self) -> Iterator[bytes]:
        """One entry for each path, in the file's order.

        Raises:
            InputError: no column of paths, or several; a row without a path; a damaged file.
        """
        readers: dict[str, Callable[[Path], Iterator[Any]]]
        readers = {".txt": _lines, ".csv": _csv_column, ".tsv": _csv_column, ".parquet": _parquet_column}
        return (entry_of(self.path, key) for key in readers[self.path.suffix.lower()](self.path))

    def open(self, entry: bytes) -> BinaryIO:
        """Open an image's file.

        Raises:
            NotRegularError: a pipe, a socket or a device.
            OSError: the file can't be opened.
        """
        return open_regular(self.path.parent / key_of(entry))


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a text file, without blank ones and comments (which start with #)."""
    with path.open("rb") as file:
        if file.read(len(BOM_UTF8)) != BOM_UTF8:  # some editors put this mark first
            file.seek(0)
        for line in _bounded_lines(path, file):
            text = line.rstrip(b"\r\n")
            if text.strip() and not text.startswith(b"#"):
                yield text


def _bounded_lines(path: Path, file: IO[AnyStr]) -> Iterator[AnyStr]:
    """The lines of a file; refuses lines of `LONGEST_LINE` and more."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise InputError(
                f"{path}: line {number} is too long for a list of paths; is it text with one image a line?"
            )
        yield line


def _csv_column(path: Path) -> Iterator[str]:
    """The column of paths of a .csv or .tsv, with or without a header row."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(_bounded_lines(path, file), delimiter=delimiter)
        try:
            first_row = next((row for row in rows if row), [])
            column = _path_column(path, [name.strip() for name in first_row])
            data_rows: Iterator[list[str]]
            if column is None:
                column, column_text = _column_without_header(path, first_row), "the first column"
                data_rows = chain([first_row], rows)
            else:
                column_text, data_rows = f"column '{first_row[column]}'", rows
            for row in data_rows:
                if row and (len(row) <= column or not row[column].strip()):
                    raise InputError(f"{path}: line {rows.line_num} has no path in {column_text}; fill or remove it")
                if row:
                    yield row[column]
        except csv.Error as error:
            raise InputError(
                f"{path}: line {rows.line_num} is not {path.suffix[1:]}: {first_line(error)}; repair it"
            ) from error


def _column_without_header(path: Path, first_row: list[str]) -> int:
    """0, if the first row is data that start with a path.

    Raises:
        InputError: it is not.
    """
    first_cell = first_row[0] if first_row else ""
    # os.path.isfile, as Path.is_file raises on text that can't be a path.
    if not first_row or is_named_as_image(first_cell) or os.path.isfile(path.parent / first_cell):  # noqa: PTH113
        return 0
    raise InputError(
        f"{path}: no column is called {_column_names()}, and its first line starts with {first_cell[:80]!r}, "
        "which is no image; name the column of paths 'path'"
    )


def _parquet_column(path: Path) -> Iterator[str | bytes]:
    """The column of paths of a .parquet."""
    try:
        with path.open("rb") as raw, pq.ParquetFile(raw, buffer_size=READ_AHEAD_BYTES) as file:
            column = _parquet_path_column(path, file.schema_arrow)
            batches = file.iter_batches(BATCH_ROWS, columns=[column], use_threads=False)
            keys = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            for row, key in enumerate(keys):
                if not key or not key.strip():
                    raise InputError(f"{path}: row {row} has no path in column '{column}'; fill or remove it")
                yield key
    except InputError:
        raise
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the file's
            raise
        raise InputError(f"{path}: can't be read as .parquet ({first_line(error)}); write it again") from error


def _parquet_path_column(path: Path, schema: pa.Schema) -> str:
    """Name of the column of paths.

    Raises:
        InputError: there is none, or it holds something else than text.
    """
    column = _path_column(path, schema.names)
    if column is None:
        raise InputError(
            f"{path}: no column is called {_column_names()} (there are {_shortened(schema.names)}); "
            "rename the column of paths"
        )
    name, kind = schema.names[column], schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(kind).removeprefix("large_").removesuffix("_view") not in ("string", "binary"):
        raise InputError(
            f"{path}: column '{name}' holds {str(kind)[:80]}, not paths; for images in the table itself, "
            "load it with `datasets` and give the folder that save_to_disk writes"
        )
    return name


def _path_column(path: Path, names: Sequence[str]) -> int | None:
    """Index of the column of paths, or None if no column has such a name.

    Raises:
        InputError: several have.
    """
    indices = [index for index, name in enumerate(names) if name.lower() in PATH_COLUMNS]
    if len(indices) > 1:
        raise InputError(
            f"{path}: which column holds the paths, {_shortened([names[index] for index in indices])}? "
            "Rename or remove all but one"
        )
    return indices[0] if indices else None


def _column_names() -> str:
    return f"{', '.join(PATH_COLUMNS[:-1])} or {PATH_COLUMNS[-1]}"


def _shortened(names: Sequence[str]) -> str:
    """The names as text, shortened for a message."""
    shown = ", ".join(repr(name[:40]) for name in names[:8])
    return f"{shown}, ..." if len(names) > 8 else shown

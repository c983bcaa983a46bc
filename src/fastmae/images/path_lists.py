"""A list of image paths as a source: a .txt with one path a line, or one column of a .csv, .tsv or .parquet.

The list is read as a stream, never whole.
"""

import csv
import io
import logging
import os
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, AnyStr, BinaryIO, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastmae.errors import InputError, first_line
from fastmae.images.entries import entry_of, key_of, plain_name
from fastmae.images.folders import is_named_as_image
from fastmae.outside.regular_file import open_regular

log = logging.getLogger(__name__)

LIST_SUFFIXES = frozenset([".txt", ".csv", ".tsv", ".parquet"])
PATH_COLUMNS = ("path", "image", "file", "filename", "file_name")
"""Names of the column of paths, in upper or lower case."""
LONGEST_LINE = 1 << 20
"""Longest line, all columns included, in bytes or characters. A file without line ends must not fill the memory."""
BATCH_ROWS, READ_AHEAD_BYTES = 1 << 16, 1 << 20
"""Rows of a .parquet that are decoded at a time, and the buffer that it is read through."""
LARGEST_CHUNK, PAGE_HEADERS = 1 << 29, 1 << 16
"""Most bytes of the paths in one row group of a .parquet, unfolded, and what may come on top if there are few rows."""
UNFOLDED_BYTES = 1 << 24
"""Bytes of text that are made of a .parquet at a time."""
WRITE_PATHS = "give a table of paths; of images, load it with `datasets` and give the folder that save_to_disk writes"
IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"II*\0", b"MM\0*", b"BM")
"""First bytes of JPEG, PNG, WebP, GIF, TIFF and BMP files."""


@dataclass(frozen=True)
class ListSource:
    """The images that a file lists; a key is the path as written there. Relative paths start at the file's folder."""

    path: Path
    kind: ClassVar[str] = "list"

    def entries(self) -> Iterator[bytes]:
        """One entry for each path, in the file's order. `./a.jpg` and `a.jpg` are one path.

        Raises:
            InputError: no column of paths, or several; a row without a path; a damaged file.
        """
        readers: dict[str, Callable[[Path], Iterator[Any]]]
        readers = {".txt": _lines, ".csv": _csv_column, ".tsv": _csv_column, ".parquet": _parquet_column}
        for key in readers[self.path.suffix.lower()](self.path):
            text = key if isinstance(key, str) else key.decode("utf-8", "surrogateescape")
            yield entry_of(self.path, plain_name(text))

    def open(self, entry: bytes) -> BinaryIO:
        """Open an image's file.

        Raises:
            NotRegularError: a pipe, a socket or a device.
            OSError: the file can't be opened.
        """
        return open_regular(self.path.parent / key_of(entry))


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a text file, without blank ones and comments, which start with # and are counted in a line."""
    comments = 0
    with open_regular(path) as file:
        if file.read(len(BOM_UTF8)) != BOM_UTF8:  # some editors put this mark first
            file.seek(0)
        for line in _bounded_lines(path, file):
            text = line.rstrip(b"\r\n")
            if text.startswith(b"#"):
                comments += 1
            elif text.strip():
                yield text
    if comments:
        log.info(
            f"{path}: lines that begin with #, which are left out as comments: {comments}; "
            "write ./#... for a file whose name begins so"
        )


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
    with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _bounded_lines(path, file)
        begin = _up_to_text(lines)
        rows = csv.reader(chain(begin, lines), delimiter=_delimiter(path, begin[-1] if begin else ""))
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


def _up_to_text(lines: Iterator[str]) -> list[str]:
    """The lines up to the first that is not blank."""
    begin = []
    for line in lines:
        begin.append(line)
        if line.strip():
            break
    return begin


def _delimiter(path: Path, first_line: str) -> str:
    """What separates the columns: a tab in a .tsv; a comma in a .csv, or a semicolon where only that gives paths.

    Spreadsheets write semicolons where the comma is the decimal mark.
    """
    if path.suffix.lower() == ".tsv":
        return "\t"
    cells = [cell.strip().strip('"') for cell in first_line.split(";")]
    has_semicolons = "," not in first_line and len(cells) > 1
    names_paths = is_named_as_image(cells[0]) or any(cell.lower() in PATH_COLUMNS for cell in cells)
    return ";" if has_semicolons and names_paths else ","


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
        with open_regular(path) as raw:
            with pq.ParquetFile(raw, buffer_size=READ_AHEAD_BYTES) as file:
                column = _parquet_path_column(path, file.schema_arrow)
                _check_unfolded_sizes(path, file.metadata, column)
            # As a dictionary, text that repeats is not unfolded: a long cell can be repeated in few bytes.
            file = pq.ParquetFile(raw, buffer_size=READ_AHEAD_BYTES, read_dictionary=[column])
            batches = file.iter_batches(BATCH_ROWS, columns=[column], use_threads=False)
            cells = chain.from_iterable(_cells(path, batch.column(0)) for batch in batches)
            for row, key in enumerate(cells):
                if not key or not key.strip():
                    raise InputError(f"{path}: row {row} has no path in column '{column}'; fill or remove it")
                if isinstance(key, bytes) and b"\0" in key and key.startswith(IMAGE_STARTS):
                    raise _holds_images(path, column)
                yield key
    except InputError:
        raise
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the file's
            raise
        raise InputError(f"{path}: can't be read as .parquet ({first_line(error)}); write it again") from error


def _check_unfolded_sizes(path: Path, metadata: pq.FileMetaData, column: str) -> None:
    """Check that the column holds no more than paths may take, before any of it is unfolded.

    Raises:
        InputError: paths of `LONGEST_LINE` bytes on average, or more than `LARGEST_CHUNK` at a time.
    """
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        chunks = map(row_group.column, range(row_group.num_columns))
        unfolded = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
        if not 0 <= unfolded <= min(LARGEST_CHUNK, LONGEST_LINE * row_group.num_rows + PAGE_HEADERS):
            raise InputError(
                f"{path}: column '{column}' unfolds to {unfolded / 1e6:.4g} MB in one row group "
                f"of {row_group.num_rows} rows; {WRITE_PATHS}"
            )


def _cells(path: Path, column: pa.DictionaryArray) -> Iterator[str | bytes | None]:
    """The cells of a column, of which a few are unfolded at a time.

    Raises:
        InputError: a cell of `LONGEST_LINE` bytes or more.
    """
    longest = pc.max(pc.binary_length(column.dictionary)).as_py() or 1
    if longest >= LONGEST_LINE:
        raise InputError(f"{path}: a cell of {longest / 1e6:.4g} MB is too long for a path; {WRITE_PATHS}")
    rows = max(1, UNFOLDED_BYTES // longest)
    for start in range(0, len(column), rows):
        yield from column[start : start + rows].dictionary_decode().to_pylist()


def _holds_images(path: Path, column: str) -> InputError:
    return InputError(
        f"{path}: column '{column}' holds the images themselves, not paths; read the file with `datasets`, cast the "
        "column to datasets.Image(), and give the folder that save_to_disk writes"
    )


def _parquet_path_column(path: Path, schema: pa.Schema) -> str:
    """Name of the column of paths.

    Raises:
        InputError: there is none, or it holds something else than text.
    """
    column = _path_column(path, schema.names)
    if column is None:
        images = next((field.name for field in schema if _may_hold_images(field.type)), None)
        if images is not None:
            raise _holds_images(path, images)
        raise InputError(
            f"{path}: no column is called {_column_names()} (there are {_shortened(schema.names)}); "
            "rename the column of paths"
        )
    name, kind = schema.names[column], schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_struct(kind) and _may_hold_images(kind):
        raise _holds_images(path, name)
    if not _is_text(kind):
        raise InputError(f"{path}: column '{name}' holds {str(kind)[:80]}, not paths; {WRITE_PATHS}")
    return name


def _is_text(kind: pa.DataType) -> bool:
    return str(kind).removeprefix("large_").removesuffix("_view") in ("string", "binary")


def _may_hold_images(kind: pa.DataType) -> bool:
    """Whether a column holds bytes, or a struct with bytes, as `datasets` writes images."""
    if pa.types.is_struct(kind):
        return any(_may_hold_images(kind.field(index).type) for index in range(kind.num_fields))
    return "binary" in str(kind)


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

"""A folder written by save_to_disk of Hugging Face `datasets`, as a source.

That library opens the folder; images are taken from it as undecoded bytes.
"""

import importlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from fastmae.errors import InputError, first_line
from fastmae.images.entries import entry_of, key_of, numbers_of
from fastmae.outside.documents import read_json
from fastmae.outside.regular_file import open_regular

STATE_FILE, INFO_FILE, SPLITS_FILE = "state.json", "dataset_info.json", "dataset_dict.json"
SPLIT = "train"
"""The split that is taken if the dataset has several."""
BATCH_ROWS = 256
SAVE_AGAIN = "save the dataset again"


class _Splits(msgspec.Struct):
    """What dataset_dict.json tells."""

    splits: list[str]


class _DataFile(msgspec.Struct):
    """A file of a dataset, by its name in the dataset's folder."""

    filename: str


class _State(msgspec.Struct):
    """What state.json tells of the dataset's files."""

    data_files: list[_DataFile] = msgspec.field(name="_data_files")


class DatasetSource:
    """The images of a saved dataset, or of its train split if it has several.

    A key is the file name that the dataset keeps with the image. If several images share a name, `#<hash of the bytes>`
    follows; without a name, the key is `xxh3-<hash of the bytes>`. So keys don't depend on the order of the rows.

    Args:
        path: the folder.
    """

    kind: ClassVar[str] = "datasets"

    def __init__(self, path: Path):
        self.path = path
        self._images: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_images": None}

    def entries(self) -> Iterator[bytes]:
        """One entry for each row; the location is the row number.

        Reads the names twice: first as hashes, to learn which names are shared or empty; then to make the keys. The
        bytes of the images are read only if some keys need them.

        Raises:
            InputError: `datasets` is missing; no column of images or several; no train split; a row without an image;
                a damaged folder.
        """
        hashes = self._name_hashes()
        empty_name = _hashes([""])
        has_empty_names = bool((hashes == empty_name).any())
        shared = _repeated(hashes)
        ambiguous = np.union1d(shared, empty_name)
        row = 0
        for images in self._batches(read_bytes=has_empty_names or len(shared) > 0):
            names = _names(images)
            for i, needs_bytes in enumerate(_is_among(ambiguous, _hashes(names))):
                key = names[i]
                if needs_bytes:
                    key = _key_from_bytes(key, pc.struct_field(images, "bytes")[i], f"{self.path}: row {row}")
                yield entry_of(self.path, key, str(row))
                row += 1

    def open(self, entry: bytes) -> BinaryIO:
        """Open an image as bytes in memory, or the file outside the dataset that the row names by its full path.

        Raises:
            InputError: the dataset has no such row any more; or the row has neither bytes nor a full path.
            NotRegularError: the row names a pipe, a socket or a device.
            OSError: that file can't be opened.
        """
        (row,) = numbers_of(entry, 1, self.path)
        images = self._table()
        if row >= len(images):
            raise InputError(
                f"{self.path}: has {len(images)} rows, and the list names row {row}; "
                "it has changed, list the images again"
            )
        image = images[row][images.column_names[0]]
        if image["bytes"] is not None:
            return io.BytesIO(image["bytes"])
        path = Path(image["path"] or "")
        if not path.is_absolute():
            raise InputError(
                f"{self.path}: row {row} ({key_of(entry)[:80]!r}) holds no image, only a name; "
                "save the dataset with its images"
            )
        return open_regular(path)

    def _table(self) -> Any:
        """The column of images as a memory-mapped `datasets.Dataset`, opened once in each process."""
        if self._images is None:
            self._images = _open_images(self.path)
        return self._images

    def _batches(self, read_bytes: bool) -> Iterator[Any]:
        """The column of images in Arrow arrays.

        The map serves for names alone. Reading all bytes through it would keep them all in memory, so the files are
        read as streams then.
        """
        images = self._table()
        if not read_bytes:
            yield from (table.column(0) for table in images.with_format("arrow").iter(BATCH_ROWS))
            return
        options = pa.ipc.IpcReadOptions(use_threads=False)
        for file in images.cache_files:
            with pa.OSFile(file["filename"]) as arrow_file, pa.ipc.open_stream(arrow_file, options=options) as batches:
                yield from (batch.column(images.column_names[0]) for batch in batches)

    def _name_hashes(self) -> np.ndarray:
        """uint64 [rows]."""
        hashes = np.zeros(len(self._table()), np.uint64)
        row = 0
        for images in self._batches(read_bytes=False):
            hashes[row : row + len(images)] = _hashes(_names(images))
            row += len(images)
        return hashes


def is_saved_dataset(folder: Path) -> bool:
    """Whether save_to_disk wrote a folder."""
    return (folder / SPLITS_FILE).is_file() or all((folder / name).is_file() for name in (STATE_FILE, INFO_FILE))


def _open_images(path: Path) -> Any:
    try:
        datasets = importlib.import_module("datasets")  # an optional dependency, and slow to import
    except ImportError as error:
        raise InputError(
            f"{path}: was written by `datasets`, which is not installed; pip install 'fastmae[datasets]'"
        ) from error
    datasets.disable_progress_bars()
    folder = _split_folder(path)
    _check_files(folder)
    try:
        dataset = datasets.load_from_disk(str(folder), keep_in_memory=False)
        column = _image_column(path, dataset.features, datasets.Image)
        return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False)).with_format(None)
    except InputError:
        raise
    except Exception as error:  # damaged Arrow or JSON raises nearly any type
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise InputError(f"{path}: can't be read as a saved dataset ({first_line(error)}); save it again") from error


def _split_folder(path: Path) -> Path:
    """The dataset's own folder, or that of its train split."""
    if not (path / SPLITS_FILE).is_file():
        return path
    splits = read_json(path / SPLITS_FILE, _Splits, way_out=SAVE_AGAIN).splits
    if not splits:
        raise InputError(f"{path / SPLITS_FILE}: names no splits; {SAVE_AGAIN}")
    if SPLIT not in splits:
        raise InputError(
            f"{path}: has the splits {', '.join(splits)} and none called {SPLIT}; "
            f"give one of them, as {path / splits[0]}"
        )
    return path / SPLIT


def _check_files(folder: Path) -> None:
    """Check that the files that the library will open are regular ones, of sensible JSON.

    Raises:
        InputError: one is not.
        OSError: one can't be opened.
    """
    state = read_json(folder / STATE_FILE, _State, way_out=SAVE_AGAIN)
    read_json(folder / INFO_FILE, dict[str, Any], way_out=SAVE_AGAIN)
    for file in state.data_files:
        open_regular(folder / file.filename).close()


def _image_column(path: Path, features: Any, image_type: type) -> str:
    """Name of the one column of images: of the library's image type, or else of {"bytes", "path"}.

    Raises:
        InputError: there is none, or several.
    """
    columns = [name for name, kind in features.items() if isinstance(kind, image_type)]
    if not columns:
        columns = [name for name, kind in features.items() if isinstance(kind, dict) and set(kind) == {"bytes", "path"}]
    if len(columns) > 1:
        raise InputError(
            f"{path}: columns {', '.join(columns)} all hold images; "
            "keep one of them with select_columns, and save it again"
        )
    if not columns:
        raise InputError(
            f"{path}: no column of images (its columns: {', '.join(list(features)[:8])}); "
            "cast the one that holds them to datasets.Image()"
        )
    return columns[0]


def _key_from_bytes(name: str, data: Any, row: str) -> str:
    """The key of an image whose name is empty or shared.

    Args:
        name: name of the image.
        data: Arrow value with the bytes of the image.
        row: the row, for the error message.
    """
    if name and not data.is_valid:  # two rows name the same file outside the dataset
        return name
    if not data.is_valid:
        raise InputError(f"{row} holds no image; leave such rows out with filter, and save the dataset again")
    digest = xxhash.xxh3_128_hexdigest(data.as_buffer())
    return f"{name}#{digest}" if name else f"xxh3-{digest}"


def _names(images: Any) -> list[str]:
    return [name or "" for name in pc.struct_field(images, "path").to_pylist()]


def _hashes(names: list[str]) -> np.ndarray:
    """uint64 [N]."""
    return np.fromiter((xxhash.xxh3_64_intdigest(name.encode()) for name in names), np.uint64, len(names))


def _repeated(values: np.ndarray) -> np.ndarray:
    """The values that occur more than once, sorted. Also sorts `values`: a copy would cost 8 bytes a row."""
    values.sort()
    return np.unique(values[1:][values[1:] == values[:-1]])


def _is_among(sorted_values: np.ndarray, values: np.ndarray) -> np.ndarray:
    """bool [N]: whether each of `values` is in `sorted_values`, which is not empty.

    np.isin would sort both for every batch.
    """
    indices = np.searchsorted(sorted_values, values).clip(max=len(sorted_values) - 1)
    return sorted_values[indices] == values

"""A folder that Hugging Face `datasets`' save_to_disk wrote, as a source. The library reads it; images are taken as bytes, undecoded."""

import importlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from fastmae.errors import InputError, first_line
from fastmae.images.entries import entry_of, key_of, numbers_of

STATE_FILE, INFO_FILE, SPLITS_FILE = "state.json", "dataset_info.json", "dataset_dict.json"
SPLIT = "train"
"""The split of a dataset of several that is taken."""
BATCH_ROWS = 256


class DatasetSource:
    """The images of a saved dataset (of a dataset of several splits: its train split).

    A key is the file name that the dataset keeps with an image, with `#<hash of its bytes>` where several have that name, or
    `xxh3-<hash of its bytes>` where there is none; so it stays the same in whatever order the rows are.

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
        """An entry a row; the location is its number.

        Raises:
            InputError: no `datasets`, no column of images or several, no split to take, a row without an image, or a damaged folder.
        """
        hashes = self._hashes_of_names()
        unnamed = _hashes([""])
        read_bytes = bool((hashes == unnamed).any())
        shared = _repeated(hashes)
        ambiguous = np.union1d(shared, unnamed)
        row = 0
        for images in self._batches(read_bytes or len(shared) > 0):
            names = _names(images)
            for place, has_no_key in enumerate(_among(ambiguous, _hashes(names))):
                key = names[place]
                if has_no_key:
                    key = _key_by_bytes(key, pc.struct_field(images, "bytes")[place], f"{self.path}: row {row}")
                yield entry_of(self.path, key, str(row))
                row += 1

    def open(self, entry: bytes) -> BinaryIO:
        """The bytes of an image, in memory.

        Raises:
            InputError: the dataset has no such row any more, or it holds a name without bytes that is no file's full path.
            OSError: that file can't be opened.
        """
        (row,) = numbers_of(entry, 1, self.path)
        images = self._table()
        if row >= len(images):
            raise InputError(
                f"{self.path}: has {len(images)} rows, and the list names row {row}; it has changed, list the images again"
            )
        image = images[row][images.column_names[0]]
        if image["bytes"] is not None:
            return io.BytesIO(image["bytes"])
        path = Path(image["path"] or "")
        if not path.is_absolute():
            raise InputError(
                f"{self.path}: row {row} ({key_of(entry)[:80]!r}) holds no image, only a name; save the dataset with its images"
            )
        return path.open("rb")

    def _table(self) -> Any:
        """The one column of images, as a mapped `datasets.Dataset`; opened once in each process."""
        if self._images is None:
            self._images = _open_images(self.path)
        return self._images

    def _batches(self, read_bytes: bool) -> Iterator[Any]:
        """The column in Arrow arrays. Where the bytes are read too, not through the map: it would keep all of them in memory."""
        images = self._table()
        if not read_bytes:
            yield from (table.column(0) for table in images.with_format("arrow").iter(BATCH_ROWS))
            return
        for file in images.cache_files:
            alone = pa.ipc.IpcReadOptions(use_threads=False)
            with pa.OSFile(file["filename"]) as arrow_file, pa.ipc.open_stream(arrow_file, options=alone) as batches:
                yield from (batch.column(images.column_names[0]) for batch in batches)

    def _hashes_of_names(self) -> np.ndarray:
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
        datasets = importlib.import_module("datasets")  # an extra, and slow to import
    except ImportError as error:
        raise InputError(
            f"{path}: was written by `datasets`, which is not installed; pip install 'fastmae[datasets]'"
        ) from error
    datasets.disable_progress_bars()
    folder = _split_folder(path)
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
    if not (path / SPLITS_FILE).is_file():
        return path
    try:
        splits = [str(split) for split in json.loads((path / SPLITS_FILE).read_text(encoding="utf-8"))["splits"]]
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path / SPLITS_FILE}: names no splits; save the dataset again") from error
    if SPLIT not in splits:
        raise InputError(
            f"{path}: has the splits {', '.join(splits)} and none called {SPLIT}; give one of them, as {path / splits[0]}"
        )
    return path / SPLIT


def _image_column(path: Path, features: Any, image_type: type) -> str:
    """Name of the one column that holds images: of the library's own type, or of {"bytes", "path"}."""
    found = [name for name, kind in features.items() if isinstance(kind, image_type)]
    found = found or [
        name for name, kind in features.items() if isinstance(kind, dict) and set(kind) == {"bytes", "path"}
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"{path}: columns {', '.join(found)} all hold images; keep one of them with select_columns, and save it again"
        )
    raise InputError(
        f"{path}: no column of images (its columns: {', '.join(list(features)[:8])}); cast the one that holds them to datasets.Image()"
    )


def _key_by_bytes(name: str, data: Any, row: str) -> str:
    """The key of an image whose name is not its own, or empty; `data` is the Arrow value of its bytes."""
    if name and not data.is_valid:  # a file beside the dataset, in two rows
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
    """The values that are there more than once, sorted. Sorts `values` in place: 8 bytes a row is what ten million rows may take."""
    values.sort()
    return np.unique(values[1:][values[1:] == values[:-1]])


def _among(wanted: np.ndarray, values: np.ndarray) -> np.ndarray:
    """bool [N]: which of `values` are among `wanted`, which is sorted."""
    if not len(wanted):
        return np.zeros(len(values), bool)
    places = np.searchsorted(wanted, values).clip(max=len(wanted) - 1)
    return wanted[places] == values

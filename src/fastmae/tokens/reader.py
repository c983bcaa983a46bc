"""Reading a store: mapped, not loaded. A view is a look-up (Eq. 2): one slice of a mapped tensor, O(1).

Patch (r, c) of a middle image is pixels [16 r : 16 (r + 1), 16 c : 16 (c + 1)] and token [r, c] (for patch size 16), so
one pair of offsets, in patches, cuts both; nothing here can take them apart.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import torch

from fastmae.errors import InputError, first_line
from fastmae.images import jpeg
from fastmae.images.views import IMAGENET_MEAN, IMAGENET_STD
from fastmae.tokens.codec import Codec, code_layout, keeps_means, load_codec
from fastmae.tokens.files import LocalFiles, MissingFileError, StoreFiles, is_url, open_files
from fastmae.tokens.format import (
    CODEBOOKS_FILE,
    INDEX_FILE,
    INDEX_SCHEMA,
    MANIFEST_FILE,
    SCALES_FILE,
    STATISTICS_FILE,
    STORE_FILE,
    read_store_info,
    shard_name,
)
from fastmae.tokens.manifest import Manifest, check_description, load_tensors
from fastmae.tokens.shard import DamagedError, MappedShard

Found = TypeVar("Found")
MAPPED_SHARDS = 1 << 14
"""Most shards that a process keeps mapped; the system allows some 65,000 maps."""


@dataclass(frozen=True)
class View:
    """A patch-aligned part of a middle image.

    Attributes:
        pixels: uint8 [3, P s, P s] for s patches of P pixels a side.
        tokens: float32 [s, s, C]: the teacher's features of the same patches.
    """

    pixels: torch.Tensor
    tokens: torch.Tensor


class TokenStore:
    """A finished token store, opened for reading.

    Images are numbered 0 to `len(store) - 1`: the decoded ones, in the order of the list. Shards are mapped at first use,
    in each process for itself, so a store can be handed to any number of loader workers. Whatever is read was checked: the
    small files on opening, a shard's header when it is mapped, an image's record when a process first touches it.

    Args:
        folder: what `fastmae tokenize` wrote; or where its files are, if they are not on this machine.

    Attributes:
        most_mapped: shards that a process keeps mapped.

    Raises:
        InputError: not a store, one that is not finished, or one whose parts disagree or are damaged.
    """

    def __init__(self, folder: str | Path | StoreFiles):
        self.files: StoreFiles = LocalFiles(Path(folder)) if isinstance(folder, str | Path) else folder
        description = self.files.path(STORE_FILE)
        self.folder = description.parent
        self.info = read_store_info(self.folder)
        self.manifest = Manifest.read(self.files.path(MANIFEST_FILE))
        check_description(self.manifest, self.info, self.folder)
        self.files.pin(self.manifest.digest, self.manifest.sizes())
        if len(self.manifest.shards) != self.info.shards:
            raise InputError(
                f"{self.folder / MANIFEST_FILE}: lists {len(self.manifest.shards)} shards, store.json {self.info.shards}"
            )
        places = _read_index(self._checked(INDEX_FILE), ["shard", "row"])
        decoded = places["row"] >= 0
        self._shard_of, self._row_of = places["shard"][decoded], places["row"][decoded]
        if len(decoded) != self.info.images or not len(self):
            listed = f"lists {len(decoded)} images, store.json {self.info.images}"
            raise InputError(f"{self.folder / INDEX_FILE}: {listed}; bring back the file that belongs here")
        if not (
            (self._shard_of >= 0) & (self._shard_of < self.info.shards) & (self._row_of < self.info.shard_size)
        ).all():
            raise InputError(
                f"{self.folder / INDEX_FILE}: names shards or rows that can't be; `fastmae verify STORE --repair` makes it again"
            )
        self.skipped = int((~decoded).sum())
        self._shards: OrderedDict[int, MappedShard] = OrderedDict()
        self._checked_records: dict[int, np.ndarray] = {}
        self._bad_shards: dict[int, str] = {}
        self._fetched_again: set[int] = set()
        self.most_mapped = MAPPED_SHARDS

    def __len__(self) -> int:
        return len(self._row_of)

    def __getstate__(self) -> dict[str, Any]:
        # Maps don't travel between processes: each opens its own, and checks for itself.
        return {
            **self.__dict__,
            "_shards": OrderedDict(),
            "_checked_records": {},
            "_bad_shards": {},
            "_fetched_again": set(),
        }

    @property
    def shard_sizes(self) -> np.ndarray:
        """Images of each shard, int64 [shards]."""
        return np.bincount(self._shard_of, minlength=self.info.shards)

    @property
    def grid(self) -> int:
        """Patches along a side of the middle image."""
        return self.info.grid

    @property
    def token_dim(self) -> int:
        """Channels of a token."""
        return self.info.token_dim

    def view(self, index: int, row: int, col: int, size: int) -> View:
        """Pixels and tokens of the `size` x `size` patches whose top left one is (row, col).

        Args:
            index: of the image, 0 to len - 1.
            row: of the view's first patch, 0 to grid - size.
            col: the same, across.
            size: patches along the view's side.

        Raises:
            IndexError: no such image, or a view that leaves the middle image.
        """
        return View(self.view_pixels(index, row, col, size), self.view_tokens(index, row, col, size))

    def view_pixels(self, index: int, row: int, col: int, size: int, flipped: bool = False) -> torch.Tensor:
        """The pixels of `view` alone; mirrored from left to right, when `flipped`."""
        side = self.info.patch_size * size
        pixels = np.empty((self.info.channels, side, side), np.uint8)
        self.read_pixels(index, row, col, size, flipped, pixels)
        return torch.from_numpy(pixels)

    def view_tokens(self, index: int, row: int, col: int, size: int, flipped: bool = False) -> torch.Tensor:
        """The tokens of `view` alone, decoded; of the view mirrored from left to right, when `flipped`."""
        codes = np.empty((size, size, self.code_dim), self.code_dtype)
        mean = np.empty(self.mean_dim, np.float16)
        self.read_codes(index, row, col, size, flipped, codes, mean)
        return self.codec.decode_grids(torch.from_numpy(codes)[None], torch.from_numpy(mean)[None])[0]

    def read_pixels(self, index: int, row: int, col: int, size: int, flipped: bool, out: np.ndarray) -> None:
        """Write the pixels of a view into uint8 [K, P s, P s]."""
        rows, cols = self._pixel_slices(row, col, size)
        info = self.info
        if info.pixels == "jpeg":
            part = (rows.start, cols.start, out.shape[1], info.middle_size, info.channels)
            view = _decoded(self._record(index, MappedShard.jpeg), lambda data: jpeg.decode_part(data, *part))
        else:
            view = self._record(index, MappedShard.raw_pixels)[:, rows, cols]
        if flipped:  # NumPy copies backwards at a fifth of torch's rate
            torch.from_numpy(out).copy_(torch.from_numpy(view).flip(-1))
        else:
            out[...] = view

    def read_codes(
        self, index: int, row: int, col: int, size: int, flipped: bool, out: np.ndarray, mean: np.ndarray
    ) -> None:
        """Write the tokens of a view, as the codec has them, into [s, s, C'] of its dtype; its image's mean into float16 [C] or [0].

        A store with `flips` 'stored' looks up what the teacher gave for the mirrored image; another mirrors the grid, which
        takes the teacher as flip-equivariant.
        """
        self._check_view(row, col, size)
        if flipped and self.info.flips == "stored":
            first = self.grid - col - size
            codes, mean[...] = self._record(index, partial(MappedShard.codes, flipped=True))
            out[...] = codes[row : row + size, first : first + size]
            return
        codes, mean[...] = self._record(index, MappedShard.codes)
        codes = codes[row : row + size, col : col + size]
        out[...] = codes[:, ::-1] if flipped else codes

    def pixels(self, index: int) -> torch.Tensor:
        """The whole middle image: uint8 [K, S, S] of K channels."""
        if self.info.pixels == "raw":
            return torch.from_numpy(self._record(index, MappedShard.raw_pixels).copy())
        return torch.from_numpy(
            _decoded(self._record(index, MappedShard.jpeg), lambda data: jpeg.decode(data, self.info.channels))
        )

    def key(self, index: int) -> str:
        """An image's key, for messages."""
        return self._keys[index].as_py()

    @cached_property
    def _keys(self) -> pa.ChunkedArray:
        table = self.table(["path", "row"])
        return table["path"].filter(pa.compute.greater_equal(table["row"], 0))

    def holds_the_images_of(self, other: "TokenStore") -> bool:
        """Whether image i is the same one in both, given that both were made from one list."""
        return self._keys.equals(other._keys)

    def table(self, columns: list[str] | None = None) -> pa.Table:
        """The index: a row an image of the list, skipped ones too, with all the columns of `INDEX_SCHEMA`, or some."""
        with self._checked(INDEX_FILE).open("rb") as file:
            return read_parquet(file, columns)

    @cached_property
    def statistics(self) -> dict[str, torch.Tensor]:
        """Over the store: `mean` and `std` of each token channel, float32 [C]; `pixel_mean` and `pixel_std`, float32 [K]."""
        file = self._checked(STATISTICS_FILE)
        found = {name: torch.from_numpy(value) for name, value in load_tensors(file).items()}
        if not {"mean", "std", "pixel_mean", "pixel_std"} <= found.keys():
            raise InputError(f"{file}: lacks a mean or a deviation; `fastmae verify STORE --repair` brings it back")
        return found

    @cached_property
    def codec(self) -> Codec:
        """What turns stored tokens back into float32, on any device."""
        tensors = load_tensors(self._checked(CODEBOOKS_FILE)) if CODEBOOKS_FILE in self.manifest.files else {}
        return load_codec(self.info.codec, self.token_dim, tensors)

    @cached_property
    def code_dim(self) -> int:
        """Numbers that a token takes on the disk, C'."""
        return code_layout(self.info.codec, self.token_dim)[0]

    @cached_property
    def mean_dim(self) -> int:
        """Channels of the mean that lies beside each image's codes: C, or 0 where the codec keeps none."""
        return self.token_dim if keeps_means(self.info.codec) else 0

    @cached_property
    def code_dtype(self) -> np.dtype:
        """Of those numbers."""
        return np.dtype(code_layout(self.info.codec, self.token_dim)[1])

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation by which the middle images are normalised: ImageNet's for RGB, as in timm, else the store's own."""
        if self.info.channels == 3:
            return IMAGENET_MEAN, IMAGENET_STD
        return tuple(self.statistics["pixel_mean"].tolist()), tuple(
            self.statistics["pixel_std"].clamp(min=1e-3).tolist()
        )

    def _check_view(self, row: int, col: int, size: int) -> None:
        for offset in (row, col):
            if offset < 0 or size < 1 or offset + size > self.grid:
                raise IndexError(f"a view of patches {offset} to {offset + size - 1} of a grid of {self.grid}")

    def _pixel_slices(self, row: int, col: int, size: int) -> tuple[slice, slice]:
        self._check_view(row, col, size)
        patch = self.info.patch_size
        return slice(patch * row, patch * (row + size)), slice(patch * col, patch * (col + size))

    def _checked(self, name: str) -> Path:
        """A small file, on this machine, as it was written."""
        file = self.files.path(name)
        try:
            self.manifest.check(name, file)
        except InputError:
            if isinstance(self.files, LocalFiles):
                raise
            file.unlink(missing_ok=True)  # damaged in the cache, perhaps
            file = self.files.path(name)
            self.manifest.check(name, file)
        return file

    def _record(self, index: int, read: Callable[[MappedShard, int], Found]) -> Found:
        """Something of an image's record; from a shard that is fetched anew, once, where the cached one is damaged.

        Raises:
            IndexError: no such image.
            DamagedError: not what was written.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a store of {len(self)}")
        number, row = int(self._shard_of[index]), int(self._row_of[index])
        try:
            return read(self._shard(number), row)
        except DamagedError:
            if isinstance(self.files, LocalFiles) or number in self._bad_shards or number in self._fetched_again:
                raise
        self._fetched_again.add(number)
        self._shards.pop(number, None)
        self.files.path(shard_name(number)).unlink(missing_ok=True)
        return read(self._shard(number), row)

    def _shard(self, number: int) -> MappedShard:
        if number in self._bad_shards:
            raise DamagedError(self._bad_shards[number])
        if number not in self._shards:
            self._shards[number] = self._open(number)
            if len(self._shards) > self.most_mapped:
                self._shards.popitem(last=False)
        return self._shards[number]

    def _open(self, number: int) -> MappedShard:
        shard = self._mapped(number)
        shape = (self.grid, self.grid, self.code_dim)
        means = shard.tensors.get("token_means", np.zeros((0, 0), np.float16))
        if shard.tokens.shape[1:] != shape or shard.tokens.dtype != self.code_dtype or means.shape[1] != self.mean_dim:
            raise DamagedError(
                f"{shard.file}: holds tokens of {list(shard.tokens.shape[1:])}, not {list(shape)} as store.json says"
            )
        return shard

    def _mapped(self, number: int, tries: int = 3) -> MappedShard:
        try:
            file = self.files.path(shard_name(number))
        except MissingFileError as error:
            self._bad_shards[number] = str(error)
            raise DamagedError(str(error)) from error
        here = isinstance(self.files, LocalFiles)  # then a file that was checked stays what it was
        try:
            shard = MappedShard(
                file, *self.manifest.shards[number], self._checked_records.get(number) if here else None
            )
            if here:
                self._checked_records[number] = shard.checked
            return shard
        except DamagedError as error:
            if here or tries == 1:
                self._bad_shards[number] = str(error)
                raise
        file.unlink(
            missing_ok=True
        )  # a copy in the cache: given up for another one this moment, or damaged there; it is fetched anew
        return self._mapped(number, tries - 1)


def _decoded(data: np.ndarray, decode: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    try:
        return decode(data)
    except (IndexError, ValueError) as error:
        raise DamagedError(
            f"a stored JPEG that is none ({first_line(error)}); `fastmae verify STORE --repair` makes it again"
        ) from error


def open_scales(location: str | Path, cache: Path = Path(), limit_bytes: int = 0) -> list[TokenStore]:
    """The stores of a folder or URL, one a middle size, smallest first; a store of one size gives itself.

    Args:
        location: of the store.
        cache: folder on this machine for what is read from a URL.
        limit_bytes: that it may take.

    Raises:
        InputError: as `TokenStore`, or sizes that do not belong together.
    """
    whole = open_files(location, cache, limit_bytes)
    if not whole.exists(SCALES_FILE):
        return [TokenStore(whole)]
    file = whole.path(SCALES_FILE)
    try:
        sizes = sorted(int(size) for size in json.loads(file.read_text(encoding="utf-8"))["sizes"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{file}: can't be read ({first_line(error)}); run the same `fastmae tokenize` again"
        ) from error
    if not sizes:
        raise InputError(f"{file}: lists no size; run the same `fastmae tokenize` again")
    stores = [TokenStore(open_files(_below(location, size), cache, limit_bytes)) for size in sizes]
    for store in stores[1:]:
        if not stores[0].holds_the_images_of(store):
            raise InputError(
                f"{store.folder}: holds other images than {stores[0].folder}; run the same `fastmae tokenize` again"
            )
        if store.manifest.files.get(CODEBOOKS_FILE) != stores[0].manifest.files.get(CODEBOOKS_FILE):
            raise InputError(
                f"{store.folder}: has other codebooks than {stores[0].folder}; run the same `fastmae tokenize` again"
            )
    return stores


def _below(location: str | Path, size: int) -> str | Path:
    return f"{str(location).rstrip('/')}/{size}" if is_url(str(location)) else Path(location) / str(size)


def pooled_statistics(stores: Sequence[TokenStore]) -> dict[str, torch.Tensor]:
    """`mean` and `std` of each token channel over all sizes of the same images."""
    weights = torch.tensor([float(store.grid**2) for store in stores])[:, None] / sum(store.grid**2 for store in stores)
    means, stds = (torch.stack([store.statistics[name] for store in stores]) for name in ("mean", "std"))
    mean = (weights * means).sum(0)
    return {
        "mean": mean,
        "std": ((weights * (stds.square() + means.square())).sum(0) - mean.square()).clamp(min=0).sqrt(),
    }


def read_parquet(file: IO[bytes], columns: list[str] | None = None) -> pa.Table:
    """A table, on this thread alone: pyarrow 26 with threads of its own aborts one process in five at its end, on a busy machine."""
    return pq.ParquetFile(file).read(columns=columns, use_threads=False)


def _read_index(path: Path, columns: list[str]) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:  # pyarrow takes no path that is not UTF-8
            table = read_parquet(file, columns)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: damaged ({error}); delete it and run the same `fastmae tokenize` again") from error
    if table.schema.names != columns or any(table.schema.field(c).type != INDEX_SCHEMA.field(c).type for c in columns):
        raise InputError(f"{path}: not this store's index; delete it and run the same `fastmae tokenize` again")
    return {name: table[name].to_numpy() for name in columns}

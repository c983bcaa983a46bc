"""Reading a store. A view is a look-up (Eq. 2): one slice of a mapped tensor, O(1).

Patch (r, c) of a middle image is its pixels [16 r : 16 (r + 1), 16 c : 16 (c + 1)] and its token [r, c] (for patch
size 16). One pair of offsets, in patches, cuts both, so pixels and tokens can't come apart.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from msgspec import Meta

from fastmae.errors import InputError, first_line
from fastmae.images import jpeg
from fastmae.images.mirror import copy_reversed
from fastmae.images.views import IMAGENET_MEAN, IMAGENET_STD
from fastmae.outside.documents import read_json
from fastmae.tokens.codec import Codec, code_layout, keeps_means, learnt_shapes, load_codec
from fastmae.tokens.files import StoreFiles, is_url, open_files, raise_named
from fastmae.tokens.format import (
    CODEBOOKS_FILE,
    INDEX_FILE,
    INDEX_SCHEMA,
    LARGEST_SCALES,
    LARGEST_SIDE,
    MANIFEST_FILE,
    SCALES_FILE,
    STATISTICS_FILE,
    STORE_FILE,
    read_store_info,
    shard_name,
)
from fastmae.tokens.index import decoded_rows, read_index
from fastmae.tokens.manifest import Manifest, check_description
from fastmae.tokens.shard import DamagedError, MappedShard, OpenShards
from fastmae.tokens.statistics import read_statistics
from fastmae.tokens.tensor_file import load_tensors

Value = TypeVar("Value")

SAME_IN_ALL_SIZES = ("token_dim", "patch_size", "channels", "resize", "codec", "flips", "pixels")
"""What the stores of several middle sizes must have in common, as their views fill the same batches."""


class Scales(msgspec.Struct):
    """The contents of scales.json.

    Attributes:
        sizes: middle sizes of the stores that lie beside it.
    """

    sizes: Annotated[list[Annotated[int, Meta(ge=1, le=LARGEST_SIDE)]], Meta(min_length=1, max_length=1024)]


@dataclass(frozen=True)
class View:
    """A patch-aligned crop of a middle image.

    Attributes:
        pixels: uint8 [K, P s, P s]: s x s patches of P x P pixels and K channels.
        tokens: float32 [s, s, C]: the teacher's features of the same patches.
    """

    pixels: torch.Tensor
    tokens: torch.Tensor


class TokenStore:
    """A finished token store, opened for reading.

    Images are numbered 0 to `len(store) - 1`: those that could be decoded, in the order of the list. Each process maps
    a shard when it first reads from it, so a store can be handed to any number of loader workers. Everything is
    checked: the small files when the store is opened, a shard's header when it is mapped, an image's record when it is
    first touched. What is checked is that the bytes are those that were written, and that they are what reading
    relies on: all shapes and dtypes follow from store.json.

    Args:
        folder: a folder that `fastmae tokenize` wrote, the URL of one, or the files of a store (`open_files`).
        cache: folder on this machine for what is read from a URL.
        cache_size: most gigabytes that `cache` may take.

    Attributes:
        statistics: `mean` and `std` of the token channels, float32 [C]; `pixel_mean` and `pixel_std`, float32 [K], in
            [0, 1].
        codec: what decodes stored tokens to float32, on any device.

    Raises:
        InputError: not a store, one that is not finished, or one whose files are damaged or do not belong together.
    """

    def __init__(
        self, folder: str | Path | StoreFiles, cache: str | Path = "~/.cache/fastmae", cache_size: float = 50.0
    ):
        if isinstance(folder, str | Path):
            folder = open_files(folder, Path(cache).expanduser(), int(cache_size * 1e9))
        self.files: StoreFiles = folder
        with _named(self.files):
            self._open()

    def _open(self) -> None:
        self.folder = self.files.path(STORE_FILE).parent
        self.info = read_store_info(self.folder)
        self.manifest = Manifest.read(self.files.path(MANIFEST_FILE))
        check_description(self.manifest, self.info, self.folder)
        self.files.pin(self.manifest.digest, self.manifest.sizes())
        shard, row = decoded_rows(self._checked(INDEX_FILE), self.info)
        decoded = row >= 0
        self._shard_of, self._row_of = shard[decoded], row[decoded]
        self.skipped = len(row) - len(self._row_of)
        self.statistics = read_statistics(self._checked(STATISTICS_FILE), self.info)
        self.codec = self._read_codec()
        self.code_dim, self.code_dtype = code_layout(self.info.codec, self.info.token_dim)
        self.mean_dim = self.info.token_dim if keeps_means(self.info.codec) else 0
        self.shards = OpenShards(self.files, self.info, self.manifest)

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def location(self) -> str:
        """The store's folder or URL, for messages."""
        return self.files.location

    @property
    def shard_sizes(self) -> np.ndarray:
        """Decoded images in each shard, int64 [shards]."""
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
            index: the image's number, 0 to len - 1.
            row: row of the view's first patch in the middle image's grid, 0 to grid - size.
            col: column of that patch, 0 to grid - size.
            size: patches along the view's side.

        Raises:
            IndexError: no such image, or a view that leaves the middle image.
        """
        return View(self.view_pixels(index, row, col, size), self.view_tokens(index, row, col, size))

    def view_pixels(self, index: int, row: int, col: int, size: int, flipped: bool = False) -> torch.Tensor:
        """The pixels of a view, uint8 [K, P s, P s]; mirrored from left to right when `flipped`."""
        side = self.info.patch_size * size
        pixels = np.empty((self.info.channels, side, side), np.uint8)
        self.read_pixels(index, row, col, size, flipped, pixels)
        return torch.from_numpy(pixels)

    def view_tokens(self, index: int, row: int, col: int, size: int, flipped: bool = False) -> torch.Tensor:
        """The decoded tokens of a view, float32 [s, s, C]; those of the mirrored view when `flipped`."""
        codes = np.empty((size, size, self.code_dim), self.code_dtype)
        mean = np.empty(self.mean_dim, np.float16)
        self.read_codes(index, row, col, size, flipped, codes, mean)
        return self.codec.decode_grids(torch.from_numpy(codes)[None], torch.from_numpy(mean)[None])[0]

    def read_pixels(self, index: int, row: int, col: int, size: int, flipped: bool, out: np.ndarray) -> None:
        """Write the pixels of a view into `out`, uint8 [K, P s, P s].

        The rows of `out` are contiguous in a store of raw pixels. A JPEG takes less time with channels last.
        """
        self._check_view(row, col, size)
        info, side = self.info, self.info.patch_size * size
        top, left = info.patch_size * row, info.patch_size * col
        if info.pixels == "jpeg":
            data = self._record(index, MappedShard.jpeg)
            with self._failed_decoding_is_damage(index):
                jpeg.decode_part(data, top, left, info.middle_size, out.transpose(1, 2, 0), flipped)
            return
        view = self._record(index, MappedShard.raw_pixels)[:, top : top + side, left : left + side]
        if flipped:
            copy_reversed(view, out)
        else:
            out[...] = view

    def read_codes(
        self, index: int, row: int, col: int, size: int, flipped: bool, out: np.ndarray, mean: np.ndarray
    ) -> None:
        """Write the codes of a view into `out`, [s, s, C'], and the mean of its image into `mean`, float16 [C] or [0].

        A flipped view has the teacher's tokens of the mirrored image in a store with `flips` 'stored'. In any other
        store it has the mirrored grid of tokens, as if the teacher were equivariant to flips.
        """
        self._check_view(row, col, size)
        stored_flip = flipped and self.info.flips == "stored"
        codes, mean[...] = self._record(index, lambda shard, at: shard.codes(at, stored_flip))
        left = self.grid - col - size if stored_flip else col  # where the view begins in the mirrored image
        view = codes[row : row + size, left : left + size]
        out[...] = view[:, ::-1] if flipped and not stored_flip else view

    def pixels(self, index: int) -> torch.Tensor:
        """The whole middle image, uint8 [K, S, S]."""
        if self.info.pixels == "raw":
            return torch.from_numpy(self._record(index, MappedShard.raw_pixels).copy())
        data = self._record(index, MappedShard.jpeg)
        with self._failed_decoding_is_damage(index):
            return torch.from_numpy(jpeg.decode_middle(data, self.info.middle_size, self.info.channels))

    def key(self, index: int) -> str:
        """An image's key, for messages."""
        return self._keys[index].as_py()

    @cached_property
    def _keys(self) -> pa.ChunkedArray:
        table = self.table(["path", "row"])
        return table["path"].filter(pa.compute.greater_equal(table["row"], 0))

    def holds_the_images_of(self, other: "TokenStore") -> bool:
        """Whether image i is the same one in both stores: they were made from one list, and skipped the same images."""
        same_lists = self.info.images_sha256 == other.info.images_sha256
        return same_lists and np.array_equal(self._decoded(), other._decoded())

    def _decoded(self) -> np.ndarray:
        """Which images of the lists could be decoded: bool [images]."""
        with _named(self.files):
            return decoded_rows(self._checked(INDEX_FILE), self.info)[1] >= 0

    def table(self, columns: Sequence[str] = INDEX_SCHEMA.names) -> pa.Table:
        """The index: a row for each image, skipped ones included. Texts are dictionary-encoded."""
        with _named(self.files):
            return read_index(self._checked(INDEX_FILE), self.info, columns)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std by which middle images are normalised: for RGB ImageNet's, as in timm, else the store's own."""
        if self.info.channels == 3:
            return IMAGENET_MEAN, IMAGENET_STD
        std = self.statistics["pixel_std"].clamp(min=1e-3)
        return tuple(self.statistics["pixel_mean"].tolist()), tuple(std.tolist())

    def _read_codec(self) -> Codec:
        shapes = learnt_shapes(self.info.codec, self.info.token_dim)
        return load_codec(
            self.info.codec,
            self.info.token_dim,
            load_tensors(self._checked(CODEBOOKS_FILE), shapes) if shapes else {},
        )

    def _check_view(self, row: int, col: int, size: int) -> None:
        for offset in (row, col):
            if offset < 0 or size < 1 or offset + size > self.grid:
                raise IndexError(f"a view of patches {offset} to {offset + size - 1} of a grid of {self.grid}")

    def _checked(self, name: str) -> Path:
        """A small file on this machine, after a check. A damaged copy in the cache is fetched again."""
        file = self.files.path(name)
        try:
            self.manifest.check(name, file)
        except InputError:
            if not self.files.discard(name):
                raise
            self.manifest.check(name, self.files.path(name))
        return file

    def _record(self, index: int, read: Callable[[MappedShard, int], Value]) -> Value:
        """What `read` returns for an image's shard and row.

        Raises:
            IndexError: no such image.
            DamagedError: the record is not what was written.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a store of {len(self)}")
        row = int(self._row_of[index])
        return self.shards.read(int(self._shard_of[index]), lambda shard: read(shard, row))

    @contextlib.contextmanager
    def _failed_decoding_is_damage(self, index: int) -> Iterator[None]:
        try:
            yield
        except (IndexError, ValueError) as error:
            name = shard_name(int(self._shard_of[index]))
            cause = f"the JPEG of its image {self._row_of[index]} can't be decoded ({first_line(error)})"
            raise DamagedError(f"{self.location}/{name}: {cause}; {self.files.way_out}") from error


@contextlib.contextmanager
def _named(files: StoreFiles) -> Iterator[None]:
    """Errors about a copy in the cache name the URL that it came from."""
    try:
        yield
    except InputError as error:
        raise_named(files, error)


def open_scales(location: str | Path, cache: Path = Path(), limit_bytes: int = 0) -> list[TokenStore]:
    """The stores in a folder or behind a URL, one for each middle size, smallest first.

    Args:
        location: of a store of several sizes, or of one of a single size.
        cache: folder on this machine for what is read from a URL.
        limit_bytes: most bytes that `cache` may take.

    Raises:
        InputError: as `TokenStore`, or sizes that do not belong together.
    """
    whole = open_files(location, cache, limit_bytes)
    if not whole.exists(SCALES_FILE):
        return [TokenStore(whole)]
    file, way_out = whole.path(SCALES_FILE), "run the same `fastmae tokenize` again"
    with _named(whole):
        sizes = sorted(set(read_json(file, Scales, way_out=way_out, limit=LARGEST_SCALES).sizes))
    stores = [TokenStore(open_files(_below(location, size), cache, limit_bytes)) for size in sizes]
    first = stores[0]
    for size, store in zip(sizes, stores, strict=True):
        if store.info.middle_size != size:
            raise InputError(
                f"{store.location}: holds middle images of {store.info.middle_size} px, not {size}; {way_out}"
            )
        for name in SAME_IN_ALL_SIZES:
            expected, actual = getattr(first.info, name), getattr(store.info, name)
            if actual != expected:
                raise InputError(
                    f"{store.location}: has {name} {actual}, not {expected} as {first.location}; {way_out}"
                )
        if not first.holds_the_images_of(store):
            raise InputError(f"{store.location}: holds other images than {first.location}; {way_out}")
        if store.manifest.files.get(CODEBOOKS_FILE) != first.manifest.files.get(CODEBOOKS_FILE):
            raise InputError(f"{store.location}: has other codebooks than {first.location}; {way_out}")
    return stores


def _below(location: str | Path, size: int) -> str | Path:
    return f"{str(location).rstrip('/')}/{size}" if is_url(str(location)) else Path(location) / str(size)


def pooled_statistics(stores: Sequence[TokenStore]) -> dict[str, torch.Tensor]:
    """`mean` and `std` of each token channel, float32 [C], over all middle sizes of the same images."""
    patches = [store.grid**2 for store in stores]
    weights = torch.tensor([float(count) for count in patches])[:, None] / sum(patches)
    means, stds = (torch.stack([store.statistics[name] for store in stores]) for name in ("mean", "std"))
    mean = (weights * means).sum(0)
    mean_square = (weights * (stds.square() + means.square())).sum(0)
    return {"mean": mean, "std": (mean_square - mean.square()).clamp(min=0).sqrt()}

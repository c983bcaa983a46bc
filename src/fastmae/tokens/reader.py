"""Reading a store: mapped, not loaded. A view is a look-up (Eq. 2): one slice of a mapped tensor, O(1).

Patch (r, c) of a middle image is pixels [16 r : 16 (r + 1), 16 c : 16 (c + 1)] and token [r, c] (for patch size 16), so
one pair of offsets, in patches, cuts both; nothing here can take them apart.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import safetensors
import torch
from safetensors.numpy import load_file

from fastmae.errors import InputError, first_line
from fastmae.images.middle import decode_middle_jpeg
from fastmae.images.views import IMAGENET_MEAN, IMAGENET_STD
from fastmae.tokens.format import (
    INDEX_FILE,
    INDEX_SCHEMA,
    SCALES_FILE,
    STATISTICS_FILE,
    ShardHeader,
    read_store_info,
    shard_path,
)


@dataclass(frozen=True)
class View:
    """A patch-aligned part of a middle image.

    Attributes:
        pixels: uint8 [3, P s, P s] for s patches of P pixels a side.
        tokens: [s, s, C] in the store's dtype: the teacher's features of the same patches.
    """

    pixels: torch.Tensor
    tokens: torch.Tensor


class TokenStore:
    """A finished token store, opened for reading.

    Images are numbered 0 to `len(store) - 1`: the decoded ones, in the order of the list. Shards are mapped at first use,
    in each process for itself, so a store can be handed to any number of loader workers.

    Args:
        folder: what `fastmae tokenize` wrote.

    Raises:
        InputError: not a store, one that is not finished, or one whose parts disagree.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.info = read_store_info(self.folder)
        index = self.folder / INDEX_FILE
        if not index.is_file():
            raise InputError(f"{self.folder}: the store is not finished; run the same `fastmae tokenize` again to continue it")
        places = _read_index(index, ["shard", "row"])
        decoded = places["row"] >= 0
        self._shard_of, self._row_of = places["shard"][decoded], places["row"][decoded]
        if len(decoded) != self.info.images or not len(self):
            raise InputError(f"{index}: lists {len(decoded)} images, store.json {self.info.images}; bring back the file that belongs here")
        self.skipped = int((~decoded).sum())
        self._shards: dict[int, _MappedShard] = {}

    def __len__(self) -> int:
        return len(self._row_of)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # maps don't travel between processes; each opens its own

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

    def view_pixels(self, index: int, row: int, col: int, size: int) -> torch.Tensor:
        """The pixels of `view` alone."""
        shard, place = self._find(index)
        if shard.pixels is None:
            return self.cut(self.pixels(index), row, col, size)
        rows, cols = self._pixel_slices(row, col, size)
        return torch.from_numpy(shard.pixels[place, :, rows, cols])

    def view_tokens(self, index: int, row: int, col: int, size: int, flipped: bool = False) -> torch.Tensor:
        """The tokens of `view` alone; of the view mirrored from left to right, when `flipped`.

        A store with `flips` 'stored' looks up what the teacher gave for the mirrored image; another mirrors the grid, which
        takes the teacher as flip-equivariant.
        """
        self._check_view(row, col, size)
        shard, place = self._find(index)
        if flipped and shard.flipped_tokens is not None:
            first = self.grid - col - size
            return torch.from_numpy(shard.flipped_tokens[place, row : row + size, first : first + size])
        tokens = torch.from_numpy(shard.tokens[place, row : row + size, col : col + size])
        return tokens.flip(1) if flipped else tokens

    def cut(self, middle: torch.Tensor, row: int, col: int, size: int) -> torch.Tensor:
        """The pixels of `view`, out of the whole middle image uint8 [3, S, S]."""
        rows, cols = self._pixel_slices(row, col, size)
        return middle[:, rows, cols]

    def pixels(self, index: int) -> torch.Tensor:
        """The whole middle image: uint8 [K, S, S] of K channels."""
        shard, place = self._find(index)
        if shard.pixels is not None:
            return torch.from_numpy(shard.pixels[place])
        start, end = shard.jpeg_offsets[place : place + 2]
        return decode_middle_jpeg(torch.from_numpy(shard.jpeg[int(start) : int(end)]), self.info.channels)

    def holds_the_images_of(self, other: "TokenStore") -> bool:
        """Whether image i is the same one in both, given that both were made from one list."""
        mine, theirs = (store.table().select(["path", "row"]) for store in (self, other))
        decoded = [pa.compute.greater_equal(table["row"], 0) for table in (mine, theirs)]
        return mine["path"].filter(decoded[0]).equals(theirs["path"].filter(decoded[1]))

    def table(self) -> pa.Table:
        """The whole index: a row an image of the list, skipped ones too, with the columns of `INDEX_SCHEMA`."""
        return pq.read_table(self.folder / INDEX_FILE)

    @cached_property
    def statistics(self) -> dict[str, torch.Tensor]:
        """Over the store: `mean` and `std` of each token channel, float32 [C]; `pixel_mean` and `pixel_std`, float32 [K]."""
        path = self.folder / STATISTICS_FILE
        if not path.is_file():
            raise InputError(f"{path}: missing; run the same `fastmae tokenize` again to bring it back")
        try:
            return {name: torch.from_numpy(value) for name, value in load_file(path).items()}
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{path}: damaged ({error}); delete it and run the same `fastmae tokenize` again") from error

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation by which the middle images are normalised: ImageNet's for RGB, as in timm, else the store's own."""
        if self.info.channels == 3:
            return IMAGENET_MEAN, IMAGENET_STD
        return tuple(self.statistics["pixel_mean"].tolist()), tuple(self.statistics["pixel_std"].clamp(min=1e-3).tolist())

    def _check_view(self, row: int, col: int, size: int) -> None:
        for offset in (row, col):
            if offset < 0 or size < 1 or offset + size > self.grid:
                raise IndexError(f"a view of patches {offset} to {offset + size - 1} of a grid of {self.grid}")

    def _pixel_slices(self, row: int, col: int, size: int) -> tuple[slice, slice]:
        self._check_view(row, col, size)
        patch = self.info.patch_size
        return slice(patch * row, patch * (row + size)), slice(patch * col, patch * (col + size))

    def _find(self, index: int) -> "tuple[_MappedShard, int]":
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a store of {len(self)}")
        number = int(self._shard_of[index])
        if number not in self._shards:
            self._shards[number] = _MappedShard(self.folder, number)
        return self._shards[number], int(self._row_of[index])


class _MappedShard:
    """One shard's file, mapped by safetensors; only what is sliced is ever read."""

    def __init__(self, store: Path, number: int):
        path = shard_path(store, number)
        try:
            self.file = safetensors.safe_open(path, framework="numpy")
            held = ShardHeader.from_metadata(self.file.metadata(), path).shard
            self.tokens = self.file.get_slice("tokens")
            names = list(self.file.keys())
            self.flipped_tokens: Any = self.file.get_slice("flipped_tokens") if "flipped_tokens" in names else None
            raw = "pixels" in names
            self.pixels: Any = self.file.get_slice("pixels") if raw else None
            self.jpeg: Any = None if raw else self.file.get_slice("jpeg")
            self.jpeg_offsets = np.zeros(0) if raw else self.file.get_tensor("jpeg_offsets")
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{path}: missing or damaged ({error}); delete it and run the same `fastmae tokenize` again") from error
        if held != number:
            raise InputError(f"{path}: holds shard {held}; it was renamed, put it back in its place")


def open_scales(folder: Path) -> list[TokenStore]:
    """The stores of a folder, one a middle size, smallest first; a store of one size gives itself.

    Raises:
        InputError: as `TokenStore`, or sizes that do not belong together.
    """
    file = folder / SCALES_FILE
    if not file.exists():
        return [TokenStore(folder)]
    try:
        sizes = sorted(int(size) for size in json.loads(file.read_text(encoding="utf-8"))["sizes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: can't be read ({first_line(error)}); run the same `fastmae tokenize` again") from error
    stores = [TokenStore(folder / str(size)) for size in sizes]
    for store in stores[1:]:
        if not stores[0].holds_the_images_of(store):
            raise InputError(f"{store.folder}: holds other images than {stores[0].folder}; run the same `fastmae tokenize` again")
    return stores


def pooled_statistics(stores: Sequence[TokenStore]) -> dict[str, torch.Tensor]:
    """`mean` and `std` of each token channel over all sizes of the same images."""
    weights = torch.tensor([float(store.grid**2) for store in stores])[:, None] / sum(store.grid**2 for store in stores)
    means, stds = (torch.stack([store.statistics[name] for store in stores]) for name in ("mean", "std"))
    mean = (weights * means).sum(0)
    return {"mean": mean, "std": ((weights * (stds.square() + means.square())).sum(0) - mean.square()).clamp(min=0).sqrt()}


def _read_index(path: Path, columns: list[str]) -> dict[str, np.ndarray]:
    try:
        table = pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: damaged ({error}); delete it and run the same `fastmae tokenize` again") from error
    if table.schema.names != columns or any(table.schema.field(c).type != INDEX_SCHEMA.field(c).type for c in columns):
        raise InputError(f"{path}: not this store's index; delete it and run the same `fastmae tokenize` again")
    return {name: table[name].to_numpy() for name in columns}

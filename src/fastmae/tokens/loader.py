"""From the store to the model: aligned views are copied from the mapped shards straight into the memory of a batch."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from fastmae.images.views import Draw, ViewDraws
from fastmae.tokens.reader import TokenStore
from fastmae.tokens.shard import DamagedError

log = logging.getLogger(__name__)

ALIGNMENT = 64
"""Bytes of a cache line: each tensor of a batch begins at a multiple of it."""


@dataclass
class ViewBatch:
    """A batch of views.

    Attributes:
        pixels: uint8 [B, K, H, W]; channels last in memory where the store keeps JPEGs, as they are decoded.
        tokens: for each teacher's store, codes [B, N, C'], patches row by row; [] when tokens are not read.
        means: for each teacher's store, the images' mean tokens, float16 [B, C], or [B, 0] where it keeps none.
        ids_shuffle: int64 [B, N]: see `Draw.ids_shuffle`.
        crop: int64 [B, 3], row and column of the view's first patch in the middle image, and 1 for a flipped view.
        middle: uint8 [B, K, S, S], the whole middle images, where the target reads them.
    """

    pixels: torch.Tensor
    tokens: list[torch.Tensor]
    means: list[torch.Tensor]
    ids_shuffle: torch.Tensor
    crop: torch.Tensor
    middle: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "ViewBatch":
        """The batch on another device."""
        return ViewBatch(
            pixels=self.pixels.to(device),
            tokens=[tokens.to(device) for tokens in self.tokens],
            means=[means.to(device) for means in self.means],
            ids_shuffle=self.ids_shuffle.to(device),
            crop=self.crop.to(device),
            middle=None if self.middle is None else self.middle.to(device),
        )


class StoreViews(Dataset[ViewBatch]):
    """(epoch, index) -> a random aligned view of that image, always the same for one seed.

    Args:
        stores: for each teacher its stores, one a middle size (`open_scales`), all of the same images. Pixels come
            from the first teacher's.
        draws: how views are drawn.
        with_tokens: whether to read the stored tokens.
        with_middle: whether to read the whole middle images too.
        on_damage: 'stop' at an image that is not what was written, or 'skip' it and take the next one instead.

    Attributes:
        damaged: images that were skipped so far, by this process.

    Raises:
        ValueError: views larger than a middle image.
    """

    def __init__(
        self,
        stores: Sequence[Sequence[TokenStore]],
        draws: ViewDraws,
        with_tokens: bool = True,
        with_middle: bool = False,
        on_damage: str = "stop",
    ):
        self.grids = [store.grid for store in stores[0]]
        if draws.size > min(self.grids):
            raise ValueError(f"views of {draws.size} patches out of a grid of {min(self.grids)}")
        self.stores, self.draws, self.with_tokens, self.with_middle = stores, draws, with_tokens, with_middle
        self.on_damage = on_damage
        self.damaged: set[int] = set()
        self._warned: set[str] = set()

    def __len__(self) -> int:
        return len(self.stores[0][0])

    def __getitem__(self, visit: tuple[int, int]) -> ViewBatch:
        """A batch of one view."""
        return self.__getitems__([visit])

    def __getitems__(self, visits: Sequence[tuple[int, int]]) -> ViewBatch:
        """The views of a whole batch of (epoch, index), in memory of its own."""
        return self.batch([(index, self.draws.draw(epoch, index, self.grids)) for epoch, index in visits])

    def batch(self, views: Sequence[tuple[int, Draw]]) -> ViewBatch:
        """The views that were drawn of the images with these numbers.

        Raises:
            DamagedError: an image is not what was written, and `on_damage` is 'stop', or no image is left.
        """
        batch = self.batch_in(torch.empty(self.batch_bytes(len(views)), dtype=torch.uint8), len(views))
        self._write(batch, 0, views)
        return batch

    def batch_bytes(self, size: int) -> int:
        """Bytes of memory that `batch_in` needs for `size` views."""
        return sum(_aligned(math.prod(shape) * dtype.itemsize) for dtype, shape in self._tensors(size))

    def batch_in(self, memory: torch.Tensor, size: int) -> ViewBatch:
        """A batch whose tensors lie in given memory, with whatever values that holds.

        Args:
            memory: uint8 [at least `batch_bytes(size)`], aligned to 8 bytes.
            size: number of views, B.
        """
        tensors, start = [], 0
        for dtype, shape in self._tensors(size):
            count = math.prod(shape) * dtype.itemsize
            tensors.append(memory[start : start + count].view(dtype).view(shape))
            start += _aligned(count)
        pixels, ids_shuffle, crop, *others = tensors
        if self.stores[0][0].info.pixels == "jpeg":
            pixels = pixels.permute(0, 3, 1, 2)
        middle = others.pop() if self.with_middle else None
        return ViewBatch(pixels, others[::2], others[1::2], ids_shuffle, crop, middle)

    def _tensors(self, size: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of a batch's tensors in the order in which they lie in memory."""
        info, patches = self.stores[0][0].info, self.draws.size**2
        side, channels = self.draws.size * info.patch_size, info.channels
        view = (side, side, channels) if info.pixels == "jpeg" else (channels, side, side)
        tensors = [(torch.uint8, (size, *view)), (torch.int64, (size, patches)), (torch.int64, (size, 3))]
        for store in (scales[0] for scales in self.stores if self.with_tokens):
            code_dtype = torch.from_numpy(np.empty(0, store.code_dtype)).dtype
            tensors += [(code_dtype, (size, patches, store.code_dim)), (torch.float16, (size, store.mean_dim))]
        if self.with_middle:
            tensors.append((torch.uint8, (size, channels, info.middle_size, info.middle_size)))
        return tensors

    def fill(self, batch: ViewBatch, first: int, visits: Sequence[tuple[int, int]]) -> None:
        """Write the views of some (epoch, index) into the rows of a batch from row `first` on.

        Raises:
            DamagedError: as `batch`.
        """
        self._write(batch, first, [(index, self.draws.draw(epoch, index, self.grids)) for epoch, index in visits])

    def _write(self, batch: ViewBatch, first: int, views: Sequence[tuple[int, Draw]]) -> None:
        rows, grid = slice(first, first + len(views)), (self.draws.size, self.draws.size)
        pixels = batch.pixels[rows].numpy()  # the same memory
        codes = [tokens[rows].unflatten(1, grid).numpy() for tokens in batch.tokens]
        means = [mean[rows].numpy() for mean in batch.means]
        middle = None if batch.middle is None else batch.middle[rows]
        for row, (index, draw) in enumerate(views):
            outputs = [(code[row], mean[row]) for code, mean in zip(codes, means, strict=True)]
            read_index = self._read(index, draw, pixels[row], outputs)
            if middle is not None:
                middle[row] = self.stores[0][draw.scale].pixels(read_index)
        np.stack([draw.ids_shuffle for _, draw in views], out=batch.ids_shuffle[rows].numpy())
        batch.crop[rows] = torch.tensor([[draw.row, draw.col, draw.flipped] for _, draw in views])

    def _read(
        self, index: int, draw: Draw, pixels: np.ndarray, outputs: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> int:
        """Write a view of an image, or of the next undamaged one, into `pixels` and into each store's (codes, mean).

        Returns:
            The number of the image that was read.
        """
        crop = (draw.row, draw.col, self.draws.size, draw.flipped)
        for candidate in self._from(index):
            if candidate in self.damaged:
                continue
            try:
                self.stores[0][draw.scale].read_pixels(candidate, *crop, pixels)
                for scales, (codes, mean) in zip(self.stores, outputs, strict=False):  # no outputs without tokens
                    scales[draw.scale].read_codes(candidate, *crop, codes, mean)
                return candidate
            except DamagedError as error:
                self._skip(candidate, error)
        store = self.stores[0][0]
        raise DamagedError(f"{store.location}: all of its images are damaged; {store.files.way_out}")

    def _from(self, index: int) -> Iterator[int]:
        """An image and all that follow it, the store's first one after its last."""
        yield index
        for later in range(index + 1, index + len(self)):
            yield later % len(self)

    def _skip(self, index: int, error: DamagedError) -> None:
        key = self.stores[0][0].key(index)
        if self.on_damage == "stop":
            raise DamagedError(f"image {key}: {error}") from error
        self.damaged.add(index)
        if str(error) not in self._warned:  # a shard that is gone as a whole is named once
            self._warned.add(str(error))
            log.warning(f"skipped image {key}: {str(error).split(';')[0]}")


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT

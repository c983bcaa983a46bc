"""From the store to the model: loader workers copy aligned views from the mapped shards straight into a batch."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from fastmae.images.views import Draw, ViewDraws
from fastmae.tokens.reader import TokenStore
from fastmae.tokens.shard import DamagedError

log = logging.getLogger(__name__)

LAYOUTS = {"jpeg": torch.channels_last, "raw": torch.contiguous_format}
"""Memory layout of a batch's pixels, by how the store keeps them: a decoded JPEG is channels last."""


@dataclass
class ViewBatch:
    """A batch of views.

    Attributes:
        pixels: uint8 [B, K, H, W].
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

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "ViewBatch":
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "ViewBatch":
        """The batch in pinned memory; a DataLoader with `pin_memory` calls this."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "ViewBatch":
        return ViewBatch(
            pixels=function(self.pixels),
            tokens=[function(tokens) for tokens in self.tokens],
            means=[function(means) for means in self.means],
            ids_shuffle=function(self.ids_shuffle),
            crop=function(self.crop),
            middle=None if self.middle is None else function(self.middle),
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
        """The views of a whole batch of (epoch, index); a DataLoader prefers this to `__getitem__`."""
        return self.batch([(index, self.draws.draw(epoch, index, self.grids)) for epoch, index in visits])

    def batch(self, views: Sequence[tuple[int, Draw]]) -> ViewBatch:
        """The views that were drawn of the images with these numbers.

        Raises:
            DamagedError: an image is not what was written, and `on_damage` is 'stop', or no image is left.
        """
        store, size, count = self.stores[0][0], self.draws.size, len(views)
        channels, side, middle_side = store.info.channels, size * store.info.patch_size, store.info.middle_size
        teachers = [scales[0] for scales in self.stores] if self.with_tokens else []
        # Allocate the batch, then let the store write each view into its place in it.
        layout = LAYOUTS[store.info.pixels]
        pixels = torch.empty(count, channels, side, side, dtype=torch.uint8, memory_format=layout)
        codes = [np.empty((count, size, size, teacher.code_dim), teacher.code_dtype) for teacher in teachers]
        means = [np.empty((count, teacher.mean_dim), np.float16) for teacher in teachers]
        middle = torch.empty(count, channels, middle_side, middle_side, dtype=torch.uint8) if self.with_middle else None
        pixel_rows = pixels.numpy()  # the same memory
        for number, (index, draw) in enumerate(views):
            outputs = [(code[number], mean[number]) for code, mean in zip(codes, means, strict=True)]
            read_index = self._read(index, draw, pixel_rows[number], outputs)
            if middle is not None:
                middle[number] = self.stores[0][draw.scale].pixels(read_index)
        return ViewBatch(
            pixels=pixels,
            tokens=[torch.from_numpy(code).flatten(1, 2) for code in codes],
            means=[torch.from_numpy(mean) for mean in means],
            ids_shuffle=torch.from_numpy(np.stack([draw.ids_shuffle for _, draw in views])),
            crop=torch.tensor([[draw.row, draw.col, int(draw.flipped)] for _, draw in views]),
            middle=middle,
        )

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
        folder = self.stores[0][0].folder
        raise DamagedError(f"{folder}: all of its images are damaged; `fastmae verify STORE --repair` rebuilds them")

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

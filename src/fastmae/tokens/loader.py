"""From the store to the model: batches of aligned views, written straight from the map into the batch, in loader workers."""

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fastmae.images.views import Draw, ViewDraws
from fastmae.tokens.reader import TokenStore
from fastmae.tokens.shard import DamagedError

LAYOUTS = {"jpeg": torch.channels_last, "raw": torch.contiguous_format}
"""How a batch's pixels lie in memory, by how the store keeps them: a decoded JPEG has its colours side by side."""


@dataclass
class ViewBatch:
    """A batch of views.

    Attributes:
        pixels: uint8 [B, K, H, W].
        tokens: of each store, [B, N, C'] as its codec has them, patches row by row; none where the target does not read them.
        means: of each store, float16 [B, C], the images' mean tokens, or [B, 0] where its codec keeps none.
        ids_shuffle: int64 [B, N]: see `Draw.ids_shuffle`.
        place: int64 [B, 3]: row and column of the view's first patch in the middle image, and 1 where it is flipped.
        middle: uint8 [B, K, S, S], whole middle images, where the target reads them.
    """

    pixels: torch.Tensor
    tokens: list[torch.Tensor]
    means: list[torch.Tensor]
    ids_shuffle: torch.Tensor
    place: torch.Tensor
    middle: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "ViewBatch":
        """The same batch with a function applied to each tensor (a move to a device, say)."""
        middle = None if self.middle is None else function(self.middle)
        tokens, means = ([function(tensor) for tensor in tensors] for tensors in (self.tokens, self.means))
        return ViewBatch(function(self.pixels), tokens, means, function(self.ids_shuffle), function(self.place), middle)

    def pin_memory(self) -> "ViewBatch":
        """Called by the DataLoader."""
        return self.map(torch.Tensor.pin_memory)


class StoreViews(Dataset[ViewBatch]):
    """(epoch, index) -> a random aligned view of that image, the same for the same seed; a list of them at a time.

    Args:
        stores: of each teacher its middle sizes (`open_scales`), all of the same images; the first one's pixels are taken.
        draws: how views are drawn.
        with_tokens: read the stored tokens.
        with_middle: give the whole middle image too.
        on_damage: 'stop' at an image that is not what was written, or 'skip' it: the next one of the store stands in for it.

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
        self.told: set[str] = set()

    def __len__(self) -> int:
        return len(self.stores[0][0])

    def __getitem__(self, visit: tuple[int, int]) -> ViewBatch:
        return self.__getitems__([visit]).map(lambda tensor: tensor[0])

    def __getitems__(self, visits: Sequence[tuple[int, int]]) -> ViewBatch:  # what a DataLoader asks for a whole batch
        return self.batch([(index, self.draws.draw(epoch, index, self.grids)) for epoch, index in visits])

    def batch(self, views: Sequence[tuple[int, Draw]]) -> ViewBatch:
        """Given views of given images.

        Raises:
            DamagedError: one of them is not what was written, and damage is not to be skipped.
        """
        first, size = self.stores[0][0], self.draws.size
        count, side = len(views), size * first.info.patch_size
        teachers = self.stores if self.with_tokens else ()
        made = ViewBatch(
            torch.empty(
                count, first.info.channels, side, side, dtype=torch.uint8, memory_format=LAYOUTS[first.info.pixels]
            ),
            [torch.empty(count, size, size, s[0].code_dim, dtype=_torch_dtype(s[0])) for s in teachers],
            [torch.empty(count, s[0].mean_dim, dtype=torch.float16) for s in teachers],
            torch.from_numpy(np.stack([draw.ids_shuffle for _, draw in views])),
            torch.tensor([[draw.row, draw.col, int(draw.flipped)] for _, draw in views]),
            torch.empty(count, first.info.channels, *2 * [first.info.middle_size], dtype=torch.uint8)
            if self.with_middle
            else None,
        )
        pixels, encoded = (
            made.pixels.numpy(),
            [(codes.numpy(), means.numpy()) for codes, means in zip(made.tokens, made.means, strict=True)],
        )
        for place, (index, draw) in enumerate(views):
            shown = self._read(index, draw, pixels[place], [(codes[place], means[place]) for codes, means in encoded])
            if made.middle is not None:
                made.middle[place] = self.stores[0][draw.scale].pixels(shown)
        made.tokens = [tokens.flatten(1, 2) for tokens in made.tokens]
        return made

    def _read(self, index: int, draw: Draw, pixels: np.ndarray, tokens: Sequence[tuple[np.ndarray, np.ndarray]]) -> int:
        """Write a view of an image, or of the next one that is not damaged; which one it was."""
        where = (draw.row, draw.col, self.draws.size, draw.flipped)
        for candidate in itertools.chain([index], (later % len(self) for later in range(index + 1, index + len(self)))):
            if candidate in self.damaged:
                continue
            try:
                self.stores[0][draw.scale].read_pixels(candidate, *where, pixels)
                for scales, (codes, mean) in zip(self.stores, tokens, strict=False):
                    scales[draw.scale].read_codes(candidate, *where, codes, mean)
                return candidate
            except DamagedError as error:
                if self.on_damage == "stop":
                    raise DamagedError(f"image {self.stores[0][0].key(candidate)}: {error}") from error
                self.damaged.add(candidate)
                if str(error) not in self.told:  # a shard that is gone as a whole is named once
                    self.told.add(str(error))
                    print(
                        f"skipped image {self.stores[0][0].key(candidate)}: {str(error).split(';')[0]}",
                        file=sys.stderr,
                        flush=True,
                    )
        raise DamagedError(
            f"{self.stores[0][0].folder}: all of its images are damaged; `fastmae verify STORE --repair` rebuilds them"
        )


def as_read(batch: Any) -> Any:
    """For a DataLoader's `collate_fn`: `StoreViews` gives whole batches already."""
    return batch


def _torch_dtype(store: TokenStore) -> torch.dtype:
    return torch.from_numpy(np.empty(0, store.code_dtype)).dtype

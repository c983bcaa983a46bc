"""From the store to the model: aligned views as samples, read by loader workers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from fastmae.images.views import Draw, ViewDraws
from fastmae.tokens.reader import TokenStore


@dataclass
class ViewBatch:
    """A batch of views (of one, without B, as a sample).

    Attributes:
        pixels: uint8 [B, 3, H, W].
        tokens: of each store, [B, N, C] in its dtype, patches row by row; none where the target does not read them.
        order: int64 [B, N]: see `Draw.order`.
        place: int64 [B, 3]: row and column of the view's first patch in the middle image, and 1 where it is flipped.
        middle: uint8 [B, 3, S, S], whole middle images, where the target reads them.
    """

    pixels: torch.Tensor
    tokens: list[torch.Tensor]
    order: torch.Tensor
    place: torch.Tensor
    middle: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "ViewBatch":
        """The same batch with a function applied to each tensor (a move to a device, say)."""
        middle = None if self.middle is None else function(self.middle)
        return ViewBatch(function(self.pixels), [function(t) for t in self.tokens], function(self.order), function(self.place), middle)

    def pin_memory(self) -> "ViewBatch":
        """Called by the DataLoader."""
        return self.map(torch.Tensor.pin_memory)


class StoreViews(Dataset[ViewBatch]):
    """(epoch, index) -> a random aligned view of that image, the same for the same seed.

    Args:
        stores: of each teacher its middle sizes (`open_scales`), all of the same images; the first one's pixels are taken.
        draws: how views are drawn.
        with_tokens: read the stored tokens.
        with_middle: give the whole middle image too.

    Raises:
        ValueError: views larger than a middle image.
    """

    def __init__(self, stores: Sequence[Sequence[TokenStore]], draws: ViewDraws, with_tokens: bool = True, with_middle: bool = False):
        self.grids = [store.grid for store in stores[0]]
        if draws.size > min(self.grids):
            raise ValueError(f"views of {draws.size} patches out of a grid of {min(self.grids)}")
        self.stores, self.draws, self.with_tokens, self.with_middle = stores, draws, with_tokens, with_middle

    def __len__(self) -> int:
        return len(self.stores[0][0])

    def __getitem__(self, visit: tuple[int, int]) -> ViewBatch:
        epoch, index = visit
        return self.sample(index, self.draws.draw(epoch, index, self.grids))

    def sample(self, index: int, draw: Draw) -> ViewBatch:
        """A given view of an image."""
        first = self.stores[0][draw.scale]
        where = (draw.row, draw.col, self.draws.size)
        middle = first.pixels(index) if self.with_middle else None
        pixels = first.view_pixels(index, *where) if middle is None else first.cut(middle, *where)
        teachers = self.stores if self.with_tokens else []
        tokens = [scales[draw.scale].view_tokens(index, *where, draw.flipped).flatten(0, 1) for scales in teachers]
        place = torch.tensor([draw.row, draw.col, int(draw.flipped)])
        return ViewBatch(pixels.flip(-1) if draw.flipped else pixels, tokens, torch.from_numpy(draw.order), place, middle)


def collate_views(samples: list[ViewBatch]) -> ViewBatch:
    """Single views -> a batch."""
    return ViewBatch(
        torch.stack([s.pixels for s in samples]),
        [torch.stack(of_store) for of_store in zip(*(s.tokens for s in samples), strict=True)],
        torch.stack([s.order for s in samples]),
        torch.stack([s.place for s in samples]),
        None if samples[0].middle is None else torch.stack([s.middle for s in samples if s.middle is not None]),
    )

"""The patch-aligned view (Sec. 3.2.3, Fig. 4d): which patches of a middle image, whether flipped, and which are masked.

Everything random about one visit to one image is drawn here, from (seed, epoch, index) alone, so it does not depend on
the batch, the worker or the number of processes, and a resumed run draws the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BLOCK_MIN, BLOCK_SHAPE = 16, 0.3
"""Block-wise masks: the fewest patches of a rectangle, and its flattest shape (BEiT, algorithm 1)."""


@dataclass(frozen=True)
class Draw:
    """What was drawn for one visit.

    Attributes:
        scale: which of the store's middle images.
        row: of the view's first patch in the middle image's grid; every aligned place is equally likely.
        col: the same, across.
        flipped: whether the view is mirrored, left to right.
        ids_shuffle: int64 [size * size]: a random order of the view's patches; the first ones stay visible, the rest are masked.
    """

    scale: int
    row: int
    col: int
    flipped: bool
    ids_shuffle: np.ndarray


@dataclass(frozen=True)
class ViewDraws:
    """How views are drawn.

    Attributes:
        size: patches along a view's side.
        flip: mirror half of the views.
        mask: 'random', or 'block' for masks of rectangles (BEiT's).
        visible: patches that stay visible, V; a random mask does not need it, any V follows from its order.
        seed: of all draws.
    """

    size: int
    flip: bool
    mask: str
    visible: int
    seed: int

    def draw(self, epoch: int, index: int, grids: Sequence[int]) -> Draw:
        """Draw a view of `size` x `size` patches out of one of an image's middle images, of `grids` patches a side each."""
        random = np.random.default_rng((self.seed, epoch, index))
        scale = int(random.integers(len(grids))) if len(grids) > 1 else 0
        grid = grids[scale]
        row, col = random.integers(0, grid - self.size + 1, size=2)
        flipped = bool(random.random() < 0.5) and self.flip
        ids_shuffle = random.permutation(self.size**2) if self.mask == "random" else self._block_order(random)
        return Draw(scale, int(row), int(col), flipped, ids_shuffle)

    def _block_order(self, random: np.random.Generator) -> np.ndarray:
        """Rectangles of at least 16 patches and a shape between 0.3 and 1 / 0.3 (BEiT) until V patches or fewer are left.

        What the last rectangle took too much becomes visible again, drawn at random from it, so that V is exact.
        """
        masked = np.zeros((self.size, self.size), dtype=bool)
        wanted = self.size**2 - self.visible
        while (missing := wanted - int(masked.sum())) > 0:
            area = random.uniform(min(BLOCK_MIN, missing), max(BLOCK_MIN, missing))
            shape = np.exp(random.uniform(np.log(BLOCK_SHAPE), -np.log(BLOCK_SHAPE)))
            height, width = (
                max(1, min(self.size, round(side))) for side in (np.sqrt(area * shape), np.sqrt(area / shape))
            )
            top, left = random.integers(0, self.size - height + 1), random.integers(0, self.size - width + 1)
            fresh = np.zeros_like(masked)
            fresh[top : top + height, left : left + width] = True
            fresh &= ~masked
            new = random.permutation(np.flatnonzero(fresh))[:missing]
            masked.flat[new] = True
        seen, hidden = np.flatnonzero(~masked), np.flatnonzero(masked)
        return np.concatenate([random.permutation(seen), random.permutation(hidden)])


def normalise(
    pixels: torch.Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> torch.Tensor:
    """uint8 [..., K, H, W] -> float32, each channel by its mean and deviation (of values in [0, 1]); laid out as it came."""
    scale = 1 / (255 * torch.tensor(std, device=pixels.device))
    shift = -torch.tensor(mean, device=pixels.device) * 255 * scale
    if (
        pixels.dim() == 4 and pixels.stride(1) == 1 < pixels.shape[1]
    ):  # colours side by side: whole rows at a time, a fifth of the time
        rows = pixels.permute(0, 2, 3, 1).flatten(2).float()
        width = pixels.shape[3]
        return rows.mul_(scale.repeat(width)).add_(shift.repeat(width)).unflatten(2, (width, -1)).permute(0, 3, 1, 2)
    return pixels.float().mul_(scale.view(-1, 1, 1)).add_(shift.view(-1, 1, 1))

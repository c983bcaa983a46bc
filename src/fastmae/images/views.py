"""The patch-aligned view (Sec. 3.2.3, Fig. 4d): which patches of a middle image it takes, its flip and its mask.

All that is random about one visit to one image is drawn here, from (seed, epoch, index) alone. So it does not depend
on the batch, the worker or the number of processes, and a resumed run draws the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BLOCK_MIN_PATCHES, BLOCK_MIN_ASPECT = 16, 0.3
"""Block-wise masks: the smallest area and the smallest aspect ratio of a rectangle (BEiT, Algorithm 1)."""


@dataclass(frozen=True)
class Draw:
    """What was drawn for one visit to an image.

    Attributes:
        scale: index of the middle image, if the store keeps several sizes of each image.
        row: row of the view's first patch in the middle image's grid; all aligned positions are equally likely.
        col: column of the view's first patch in the middle image's grid.
        flipped: whether the view is mirrored, left to right.
        ids_shuffle: int64 [size * size], a random order of the view's patches; the first V stay visible, the rest are
            masked.
    """

    scale: int
    row: int
    col: int
    flipped: bool
    ids_shuffle: np.ndarray


@dataclass(frozen=True)
class ViewDraws:
    """The distribution that views are drawn from.

    Attributes:
        size: side of the view, in patches.
        flip: whether half of the views are mirrored.
        mask: 'random', or 'block' for masks made of rectangles (BEiT).
        visible: number of visible patches, V. Only 'block' uses it: the order of a random mask suits any V.
        seed: seed of all draws.
    """

    size: int
    flip: bool
    mask: str
    visible: int
    seed: int

    def __post_init__(self) -> None:
        assert 0 <= self.seed < 2**32

    def draw(self, epoch: int, index: int, grids: Sequence[int]) -> Draw:
        """Draw the view of one image in one epoch.

        Args:
            epoch: number of the epoch.
            index: index of the image.
            grids: side of each of the image's middle images, in patches.
        """
        rng = np.random.default_rng(np.array([self.seed, epoch, index], np.uint32))  # a tuple takes longer
        scale = int(rng.integers(len(grids))) if len(grids) > 1 else 0
        positions = grids[scale] - self.size + 1
        row, col = int(rng.integers(positions)), int(rng.integers(positions))  # an array of both takes longer
        flipped = rng.random() < 0.5 and self.flip
        ids_shuffle = rng.permutation(self.size**2) if self.mask == "random" else self._block_order(rng)
        return Draw(scale, row, col, flipped, ids_shuffle)

    def _block_order(self, rng: np.random.Generator) -> np.ndarray:
        """A patch order whose masked part is made of rectangles (BEiT, Algorithm 1).

        Masks random rectangles until at most V patches are left. The last rectangle masks only a random subset of its
        patches, so that exactly V stay visible.
        """
        masked = np.zeros((self.size, self.size), dtype=bool)
        num_masked = self.size**2 - self.visible
        while (missing := num_masked - int(masked.sum())) > 0:
            area = rng.uniform(min(BLOCK_MIN_PATCHES, missing), max(BLOCK_MIN_PATCHES, missing))
            aspect = np.exp(rng.uniform(np.log(BLOCK_MIN_ASPECT), -np.log(BLOCK_MIN_ASPECT)))
            height = max(1, min(self.size, round(np.sqrt(area * aspect))))
            width = max(1, min(self.size, round(np.sqrt(area / aspect))))
            top, left = rng.integers(0, self.size - height + 1), rng.integers(0, self.size - width + 1)
            rectangle = np.zeros_like(masked)
            rectangle[top : top + height, left : left + width] = True
            newly_masked = rng.permutation(np.flatnonzero(rectangle & ~masked))[:missing]
            masked.flat[newly_masked] = True
        ids_visible, ids_masked = np.flatnonzero(~masked), np.flatnonzero(masked)
        return np.concatenate([rng.permutation(ids_visible), rng.permutation(ids_masked)])


class PixelScale:
    """Normalises pixels. Its constants move to the pixels' device once, so that later calls wait for nothing.

    Args:
        mean: mean of each channel, of values in [0, 1].
        std: standard deviation of each channel, of values in [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.scale = 1 / (255 * torch.tensor(std))
        self.shift = -torch.tensor(mean) * 255 * self.scale

    def to(self, device: torch.device | str) -> None:
        """Move the constants to a device; nothing happens if they are there."""
        self.scale, self.shift = self.scale.to(device), self.shift.to(device)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise each channel.

        Args:
            pixels: uint8 [..., K, H, W].

        Returns:
            [..., K, H, W] in the memory layout of `pixels`: float32, or under autocast in the dtype that the network's
            first layer would cast to.
        """
        self.to(pixels.device)
        channels_last = pixels.dim() == 4 and pixels.stride(1) == 1 < pixels.shape[1]
        if channels_last:  # as rows [B, H, W * K], which takes a fifth of the time
            rows, width = pixels.permute(0, 2, 3, 1).flatten(2), pixels.shape[3]
            normalised = self._scaled(rows, self.scale.repeat(width), self.shift.repeat(width))
            return normalised.unflatten(2, (width, -1)).permute(0, 3, 1, 2)
        return self._scaled(pixels, self.scale.view(-1, 1, 1), self.shift.view(-1, 1, 1))

    def _scaled(self, pixels: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """shift + pixels * scale, computed in float32."""
        device = pixels.device.type
        if not torch.is_autocast_enabled(device):  # a CPU takes half of the time for three simple passes
            return pixels.float().mul_(scale).add_(shift)
        # One pass, from uint8 to the dtype of the result.
        out = torch.empty_like(pixels, dtype=torch.get_autocast_dtype(device))
        return torch.addcmul(shift, pixels, scale, out=out)


def normalise(
    pixels: torch.Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> torch.Tensor:
    """`PixelScale` for pixels uint8 [..., K, H, W] on any device; a loop over batches keeps a `PixelScale` instead."""
    return PixelScale(mean, std)(pixels)

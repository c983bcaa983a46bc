"""Scores of every pixel of a photo of any size: by one forward of the whole, or by windows that overlap.

`network` gives scores of both its heads for images whose sides are multiples of the patch; the main head's are used.

Shapes: one image of H x W pixels, C classes.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

Network = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
WINDOWS_AT_ONCE = 4
"""Windows a forward."""
LEAST_PATCHES = 2
"""Along a side: half of the last map must still hold something."""


def stride_of(window: int) -> int:
    """How far one window lies from the next: two thirds of it, 341 of 512."""
    return window * 2 // 3


def whole_scores(network: Network, images: torch.Tensor, patch: int) -> torch.Tensor:
    """Scores of whole images, float32 [B, C, H, W].

    Args:
        network: as the module says.
        images: float [B, K, H, W], normalised; filled up to multiples of the patch, to the right and below, with the mean colour.
        patch: side of a patch, in pixels.
    """
    height, width = images.shape[-2:]
    rows, cols = (max(LEAST_PATCHES, -(-side // patch)) * patch for side in (height, width))
    scores, _ = network(F.pad(images, (0, cols - width, 0, rows - height)))
    return enlarged(scores, (rows, cols))[..., :height, :width]


def sliding_scores(network: Network, images: torch.Tensor, patch: int, window: int) -> torch.Tensor:
    """The mean of the scores of all windows that a pixel lies in, float32 [1, C, H, W].

    Args:
        network: as the module says.
        images: float [1, K, H, W], normalised. Along a side that is shorter than it a window takes all of it.
        patch: side of a patch, in pixels.
        window: its side, in pixels.
    """
    places = list(_places(images.shape[-2:], window))
    total = count = images.new_zeros(())
    for first in range(0, len(places), WINDOWS_AT_ONCE):
        part = places[first : first + WINDOWS_AT_ONCE]
        found = whole_scores(network, torch.cat([images[..., rows, cols] for rows, cols in part]), patch)
        if not total.dim():
            total, count = (found.new_zeros(1, channels, *images.shape[-2:]) for channels in (found.shape[1], 1))
        for (rows, cols), scores in zip(part, found, strict=True):
            total[..., rows, cols] += scores
            count[..., rows, cols] += 1
    return total / count


def enlarged(scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Scores at another size, bilinearly, float32."""
    return (
        scores.float()
        if scores.shape[-2:] == size
        else F.interpolate(scores.float(), size=size, mode="bilinear", align_corners=False)
    )


def _places(size: torch.Size, window: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each window; the last one along a side ends where the image does."""
    starts = [[*range(0, max(length - window, 0), stride_of(window)), max(length - window, 0)] for length in size]
    for top in starts[0]:
        for left in starts[1]:
            yield slice(top, top + window), slice(left, left + window)

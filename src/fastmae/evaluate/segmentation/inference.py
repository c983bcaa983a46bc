"""Class scores of every pixel of a photo of any size: in one forward pass, or averaged over overlapping windows.

`network` gives the scores of its two heads for images whose sides are multiples of the patch size; the main head's are
used.

Shapes: B images of H x W pixels with K channels, C classes.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

Network = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
WINDOWS_AT_ONCE = 4
"""Number of windows in a forward pass."""
MIN_PATCHES = 2
"""Patches along a side that the network needs at least: its last map is halved."""


def stride_of(window: int) -> int:
    """Distance between neighbouring windows: two thirds of their side, 341 pixels for 512."""
    return window * 2 // 3


def whole_scores(network: Network, images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Scores from one forward pass, float32 [B, C, H, W].

    Args:
        network: as in the module's docstring.
        images: float [B, K, H, W], normalised. They are padded to whole patches, right and below, with the mean colour.
        patch_size: side of a patch, in pixels.
    """
    height, width = images.shape[-2:]
    padded_height, padded_width = (max(MIN_PATCHES, -(-side // patch_size)) * patch_size for side in (height, width))
    scores, _ = network(F.pad(images, (0, padded_width - width, 0, padded_height - height)))
    return resize_scores(scores, (padded_height, padded_width))[..., :height, :width]


def sliding_scores(network: Network, images: torch.Tensor, patch_size: int, window: int) -> torch.Tensor:
    """Scores averaged over all windows that contain a pixel, float32 [1, C, H, W].

    Args:
        network: as in the module's docstring.
        images: float [1, K, H, W], normalised. A side shorter than the window is covered by one window.
        patch_size: side of a patch, in pixels.
        window: side of a window, in pixels.
    """
    height, width = images.shape[-2:]
    windows = list(_windows(height, width, window))
    total = coverage = images.new_zeros(())
    for start in range(0, len(windows), WINDOWS_AT_ONCE):
        batch = windows[start : start + WINDOWS_AT_ONCE]
        crops = torch.cat([images[..., rows, cols] for rows, cols in batch])
        crop_scores = whole_scores(network, crops, patch_size)
        if start == 0:
            total = crop_scores.new_zeros(1, crop_scores.shape[1], height, width)
            coverage = crop_scores.new_zeros(1, 1, height, width)
        for (rows, cols), scores in zip(batch, crop_scores, strict=True):
            total[..., rows, cols] += scores
            coverage[..., rows, cols] += 1
    return total / coverage


def resize_scores(scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[B, C, h, w] -> float32 [B, C, *size], bilinearly."""
    if scores.shape[-2:] == size:
        return scores.float()
    return F.interpolate(scores.float(), size=size, mode="bilinear", align_corners=False)


def _windows(height: int, width: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each window. The last one along a side ends where the image does."""
    tops, lefts = (
        [*range(0, max(side - window, 0), stride_of(window)), max(side - window, 0)] for side in (height, width)
    )
    for top in tops:
        for left in lefts:
            yield slice(top, top + window), slice(left, left + window)

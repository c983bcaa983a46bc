"""Histograms of oriented gradients (Dalal and Triggs 2005), as MaskFeat predicts them.

Our own code: scikit-image and OpenCV compute HOG for one NumPy image at a time, not for a batch on a device.
"""

import math

import torch
import torch.nn.functional as F

HOG_BINS, HOG_CELL = 9, 8
"""MaskFeat's number of orientations, and the side of a cell in pixels."""


def hog(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Histograms of unsigned orientations, in 9 bins over 180 degrees, of cells of 8 x 8 pixels.

    Args:
        pixels: float [B, K, H, W].
        patch_size: P, the side of a patch in pixels; a multiple of 8.

    Returns:
        float32 [B, N, 9 K (P / 8)^2]: the cells of a patch row by row; within a cell, one colour after the other.
    """
    # Central differences per colour, with reflected borders: [B, K, H, W] each.
    padded = F.pad(pixels.float(), (1, 1, 1, 1), mode="reflect")
    dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    # Each pixel votes with its magnitude for one bin: [B, K, 9, H, W].
    half_turns = torch.atan2(dy, dx) / math.pi
    bins = (half_turns * HOG_BINS).floor().long() % HOG_BINS
    votes = torch.zeros(*bins.shape[:2], HOG_BINS, *bins.shape[2:], device=pixels.device)
    votes.scatter_(2, bins.unsqueeze(2), torch.hypot(dx, dy).unsqueeze(2))
    # Average the votes in each cell, scale each histogram to unit L2 norm: [B, K * 9, H / 8, W / 8].
    histograms = F.avg_pool2d(votes.flatten(1, 2), HOG_CELL).unflatten(1, (pixels.shape[1], HOG_BINS))
    histograms = F.normalize(histograms, dim=2).flatten(1, 2)
    # Join the cells of each patch: [B, N, cells per patch * K * 9].
    side = patch_size // HOG_CELL
    batch, channels, height, width = histograms.shape
    rows, cols = height // side, width // side
    patches = histograms.reshape(batch, channels, rows, side, cols, side).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(batch, rows * cols, side**2 * channels)

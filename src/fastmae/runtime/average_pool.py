"""Adaptive average pooling that also exists where kernels must be deterministic: torch has none for its backward pass
on GPUs.
"""

import torch
import torch.nn.functional as F
from torch import nn


def average_pool(maps: torch.Tensor, side: int) -> torch.Tensor:
    """As torch's `adaptive_avg_pool2d`: float [B, C, H, W] -> [B, C, side, side].

    With deterministic algorithms, it is a product with a matrix of averages from either side, in float32.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return F.adaptive_avg_pool2d(maps, side)
    height, width = maps.shape[-2:]
    with torch.autocast(maps.device.type, enabled=False):
        pooled = _averages(side, height, maps.device) @ maps.float() @ _averages(side, width, maps.device).T
    return pooled.to(maps.dtype)


class AveragePool(nn.AdaptiveAvgPool2d):
    """torch's module, for a square output, with `average_pool` inside."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """float [B, C, H, W] -> [B, C, side, side]."""
        assert isinstance(self.output_size, int)
        return average_pool(maps, self.output_size)


def _averages(side: int, length: int, device: torch.device) -> torch.Tensor:
    """float32 [side, length]: row i averages the positions from i/side to (i + 1)/side of the length, rounded out."""
    cells, positions = torch.arange(side, device=device)[:, None], torch.arange(length, device=device)
    inside = (positions >= cells * length // side) & (positions < -(-(cells + 1) * length // side))
    return inside / inside.sum(1, keepdim=True)

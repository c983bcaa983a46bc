"""From a plain ViT's last map to a pyramid of maps (the simple feature pyramid of Li et al. 2022, ViTDet).

Strides of patch/4, patch/2, patch, 2 patch, and of 4 patch for proposals of large objects: with patches of 16 those of the usual FPN.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

from fastmae.student.encoder import Encoder

ROI_LEVELS = ("0", "1", "2", "3")
"""Names of the maps that objects are cut out of, the finest first."""
PROPOSAL_LEVEL = "pool"
"""Name of the coarsest map, for proposals only."""
PATCHES_A_STRIDE = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Stride of each map, in patches."""


class SimplePyramid(nn.Module):
    """The encoder, and its last map at four scales more than its own.

    Args:
        encoder: a timm ViT that takes images of any size.
        out_channels: of every map.
    """

    def __init__(self, encoder: Encoder, out_channels: int):
        super().__init__()
        self.encoder = encoder
        self.out_channels = out_channels
        width = encoder.embed_dim
        half, quarter = max(1, width // 2), max(1, width // 4)
        scales: list[tuple[nn.Module, int]] = [
            (nn.Sequential(_doubled(width, half), LayerNorm2d(half), nn.GELU(), _doubled(half, quarter)), quarter),
            (_doubled(width, half), half),
            (nn.Identity(), width),
            (nn.MaxPool2d(2), width),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(scale, *_projected(channels, out_channels)) for scale, channels in scales
        )
        train_what_is_read(encoder)

    def forward(self, images: Sequence[torch.Tensor]) -> "OrderedDict[str, torch.Tensor]":
        """Images, float32 [K, H, W], sides multiples of two patches -> a map for each name, float32 [B, C, rows, columns].

        Each image goes through on its own, or with those of its size: with margins to make all equally large, positions would be
        stretched over the margins too, and an image would look different in a batch than alone. Maps get margins of 0.

        float32 under mixed precision too: torchvision takes the type of its boxes from there, and bf16 has no numbers between 512
        and 516.
        """
        of_size: dict[torch.Size, list[int]] = {}
        for place, image in enumerate(images):
            of_size.setdefault(image.shape, []).append(place)
        found: list[list[torch.Tensor]] = [[] for _ in images]
        for places in of_size.values():
            for place, maps in zip(
                places, zip(*self._maps(torch.stack([images[p] for p in places])), strict=True), strict=True
            ):
                found[place] = list(maps)
        names = (*ROI_LEVELS, PROPOSAL_LEVEL)
        return OrderedDict((name, _stacked(maps)) for name, maps in zip(names, zip(*found, strict=True), strict=True))

    def _maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """[B, K, H, W] -> the maps, [B, C, H / stride, W / stride], the coarsest rounded up."""
        encoder: Any = self.encoder
        last = len(encoder.blocks) - 1
        grid = encoder.forward_intermediates(
            images, indices=[last], norm=False, output_fmt="NCHW", intermediates_only=True
        )[0]
        maps = [level(grid).float() for level in self.levels]
        return [*maps, F.max_pool2d(maps[-1], kernel_size=1, stride=2)]


def train_what_is_read(encoder: Encoder) -> None:
    """All of it, positions too, which stand still in pre-training; but not what follows the last block, a norm as a rule.

    That is not read here and stays as it was. With a gradient to come, several processes would wait for it.
    """
    encoder.requires_grad_(True)
    for name in ("norm", "fc_norm", "attn_pool"):
        unread = getattr(encoder, name, None)
        if isinstance(unread, nn.Module):
            unread.requires_grad_(False)


def _stacked(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """[C, rows, columns] of several sizes -> [B, C, most rows, most columns], with margins of 0 to the right and below."""
    rows, columns = (max(found.shape[side] for found in maps) for side in (1, 2))
    return torch.stack([F.pad(found, (0, columns - found.shape[2], 0, rows - found.shape[1])) for found in maps])


def _doubled(channels: int, out_channels: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, out_channels, kernel_size=2, stride=2)


def _projected(channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, out_channels, kernel_size=1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    ]

"""A pyramid of maps from a plain ViT's last map alone (the simple feature pyramid of Li et al. 2022, ViTDet).

Its strides are 1/4, 1/2, 1 and 2 patches, and 4 patches for proposals of large objects. With patches of 16 pixels these
are the usual FPN's. Any other network gives the usual FPN (Lin et al. 2017) itself, from its stages.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FeaturePyramidNetwork

from fastmae.evaluate.stages import Stages
from fastmae.runs.encoder import OpenedEncoder
from fastmae.student.encoder import Encoder

ROI_LEVELS = ("0", "1", "2", "3")
"""Names of the maps that RoIAlign reads, the finest first."""
PROPOSAL_LEVEL = "pool"
"""Name of the coarsest map, for proposals only."""
STRIDES_IN_PATCHES = (0.25, 0.5, 1.0, 2.0, 4.0)
FPN_PATCH = 16
"""Patch size with which these are the strides of an FPN, in pixels."""


def patch_of_pyramid(opened: OpenedEncoder) -> int:
    """The patch size that the strides count in, in pixels: a ViT's own, or `FPN_PATCH`."""
    return opened.patch_size if opened.is_vit else FPN_PATCH


class Pyramid(nn.Module, ABC):
    """The encoder, and maps of five strides from it.

    Args:
        encoder: takes images of any size.
        out_channels: width of every map.
    """

    levels: Any
    """Everything but the encoder."""

    def __init__(self, encoder: Encoder, out_channels: int):
        super().__init__()
        self.encoder: Encoder = encoder
        self.out_channels = out_channels

    def forward(self, images: Sequence[torch.Tensor]) -> "OrderedDict[str, torch.Tensor]":
        """Images float32 [K, H, W], sides multiples of two patches -> five named maps float32 [B, C, rows, cols].

        Only images of one size share a forward pass. Padded to the largest, an image's positions would be stretched
        over the padding too, and its maps would depend on the rest of the batch. Instead the maps are padded, with 0.

        The maps are float32 under mixed precision too: torchvision's boxes take their dtype, and bf16 has no numbers
        between 512 and 516.
        """
        indices_by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            indices_by_shape[image.shape].append(index)
        names = (*ROI_LEVELS, PROPOSAL_LEVEL)
        maps_of_image: dict[int, list[torch.Tensor]] = {}
        for indices in indices_by_shape.values():
            batch = torch.stack([images[index] for index in indices])
            for index, *maps in zip(indices, *self._maps(batch), strict=True):
                maps_of_image[index] = maps
        return OrderedDict(
            (name, _pad_and_stack([maps_of_image[index][level] for index in range(len(images))]))
            for level, name in enumerate(names)
        )

    @abstractmethod
    def _maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """[B, K, H, W] -> the five maps, [B, C, H / stride, W / stride], the coarsest rounded up."""


class SimplePyramid(Pyramid):
    """Maps from the last block of a plain ViT, as a `Pyramid`."""

    def __init__(self, encoder: Encoder, out_channels: int):
        super().__init__(encoder, out_channels)
        width = encoder.embed_dim
        half, quarter = max(1, width // 2), max(1, width // 4)
        scales: list[tuple[nn.Module, int]] = [
            (nn.Sequential(_upsample(width, half), LayerNorm2d(half), nn.GELU(), _upsample(half, quarter)), quarter),
            (_upsample(width, half), half),
            (nn.Identity(), width),
            (nn.MaxPool2d(2), width),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(scale, *_projection(channels, out_channels)) for scale, channels in scales
        )
        train_all_but_unread_parts(encoder)

    def _maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        last = len(self.encoder.blocks) - 1
        (grid,) = self.encoder.forward_intermediates(
            images, indices=[last], norm=False, output_fmt="NCHW", intermediates_only=True
        )
        maps = [level(grid).float() for level in self.levels]
        return [*maps, F.max_pool2d(maps[-1], kernel_size=1, stride=2)]


class StagePyramid(Pyramid):
    """An FPN on the stages of a network that is no plain ViT, as a `Pyramid`.

    In training, the network's batch norms keep the statistics that they come with: photos pass in groups of one size,
    often alone, and the statistics of one photo are no good.

    Args:
        encoder: the network.
        out_channels: width of every map.
        stages: from `trainable_stages`.
    """

    def __init__(self, encoder: Encoder, out_channels: int, stages: Stages):
        super().__init__(encoder, out_channels)
        self.stages = stages
        self.levels = FeaturePyramidNetwork(list(stages.widths), out_channels, norm_layer=LayerNorm2d)

    def train(self, mode: bool = True) -> "StagePyramid":
        """As torch's, but the encoder's batch norms stay in evaluation mode."""
        super().train(mode)
        for module in self.encoder.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def _maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps = self.stages.maps(self.encoder, images)
        levels = self.levels(OrderedDict(zip(ROI_LEVELS, maps, strict=True)))
        floats = [levels[name].float() for name in ROI_LEVELS]
        return [*floats, F.max_pool2d(floats[-1], kernel_size=1, stride=2)]


def train_all_but_unread_parts(encoder: Encoder) -> None:
    """Train the whole encoder with its positions, which pre-training fixes, but not what follows its last block.

    The pyramid doesn't read those parts, usually the final norm. If they required gradients, DDP would wait for them.
    """
    encoder.requires_grad_(True)
    for name in ("norm", "fc_norm", "attn_pool"):
        unread = getattr(encoder, name, None)
        if isinstance(unread, nn.Module):
            unread.requires_grad_(False)


def _pad_and_stack(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Maps [C, rows, cols] of several sizes -> [B, C, most rows, most cols], padded with 0 on the right and below."""
    rows, cols = (max(image_map.shape[axis] for image_map in maps) for axis in (1, 2))
    return torch.stack(
        [F.pad(image_map, (0, cols - image_map.shape[2], 0, rows - image_map.shape[1])) for image_map in maps]
    )


def _upsample(channels: int, out_channels: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, out_channels, kernel_size=2, stride=2)


def _projection(channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, out_channels, kernel_size=1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    ]

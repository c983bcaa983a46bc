"""UperNet on a ViT (Xiao et al. 2018; on plain ViTs as BEiT and MAE have it): four blocks' maps, a pyramid of them, two heads.

The heads are transformers' own, so they need no mmcv; the pyramid is this file's.

Shapes: B images of H x W pixels, P the patch, D the encoder's width, C classes. Maps of the pyramid lie at strides P/4, P/2, P, 2P.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastmae.errors import InputError
from fastmae.evaluate.segmentation.layout import IGNORED
from fastmae.student.encoder import Encoder

TAPS = (1 / 3, 1 / 2, 2 / 3, 1)
"""After which part of the blocks the maps are taken: 4, 6, 8 and 12 of 12."""
POOLS = (1, 2, 3, 6)
"""Grids to which the pyramid pooling brings the last map."""
AUXILIARY_CHANNELS, AUXILIARY_MAP, AUXILIARY_WEIGHT = 256, 2, 0.4
BEFORE_AND_IN_BLOCKS = {"patch_embed", "norm_pre", "blocks", "rope"}
"""Parts of timm's ViTs that the maps come through."""
DROPOUT = 0.1
"""Of whole channels, before each classifier."""
CLASSIFIER_DEVIATION = 0.01
"""Of the classifiers' weights at the start."""


def tapped_blocks(depth: int) -> list[int]:
    """Blocks, counted from 1, after which the four maps are taken; with fewer than four, some of them twice."""
    return [max(1, round(depth * part)) for part in TAPS]


class FeaturePyramid(nn.Module):
    """Four maps of one size -> maps four times and twice as large, as they are, and half as large.

    Args:
        width: D, of the maps.
    """

    def __init__(self, width: int):
        super().__init__()
        self.times_4 = nn.Sequential(_doubled(width), nn.BatchNorm2d(width), nn.GELU(), _doubled(width))
        self.times_2 = _doubled(width)
        self.halved = nn.MaxPool2d(2)

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """[B, D, h, w] four times -> [B, D, 4h, 4w], [B, D, 2h, 2w], [B, D, h, w], [B, D, h // 2, w // 2]."""
        first, second, third, fourth = maps
        return [self.times_4(first), self.times_2(second), third, self.halved(fourth)]


class UperNet(nn.Module):
    """The encoder with its pyramid and heads.

    Args:
        encoder: a timm ViT that takes any multiple of its patch.
        classes: C.
        head_channels: of the main head.

    Raises:
        InputError: transformers is not installed.
    """

    def __init__(self, encoder: Encoder, classes: int, head_channels: int):
        super().__init__()
        self.encoder: Encoder = encoder
        self.patch_size = int(encoder.patch_embed.patch_size[0])
        self.taps = [block - 1 for block in tapped_blocks(len(encoder.blocks))]
        width = int(encoder.embed_dim)
        self.pyramid = FeaturePyramid(width)
        self.head, self.auxiliary = _heads(width, classes, head_channels)
        for name, part in encoder.named_children():
            if (
                name not in BEFORE_AND_IN_BLOCKS
            ):  # the final norm (BEiT): kept for whoever takes the encoder out again, but not trained
                part.requires_grad_(False)
        if encoder.pos_embed is not None:
            encoder.pos_embed.requires_grad_(True)  # fixed while pre-training with masks

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the classes by the main head, [B, C, 4H/P, 4W/P], and by the auxiliary one, [B, C, H/P, W/P].

        Args:
            images: float [B, K, H, W], normalised; H and W multiples of P, and at least 2P.
        """
        taken = sorted(set(self.taps))
        found = self.encoder.forward_intermediates(
            images, indices=taken, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        maps = self.pyramid([found[taken.index(block)] for block in self.taps])
        return self.head(maps), self.auxiliary(maps)


def segmentation_loss(scores: tuple[torch.Tensor, torch.Tensor], masks: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cross-entropy at the masks' resolution, over the pixels that count: `loss` = `decode_loss` + 0.4 `auxiliary_loss`.

    Args:
        scores: of both heads, [B, C, h, w] of any size.
        masks: uint8 [B, H, W].
    """
    decode, auxiliary = (_cross_entropy(part, masks.long()) for part in scores)
    return {"loss": decode + AUXILIARY_WEIGHT * auxiliary, "decode_loss": decode, "auxiliary_loss": auxiliary}


def synchronised(network: nn.Module, device: torch.device, processes: int) -> nn.Module:
    """With the batch norms' statistics taken over all processes, where several have a GPU each (there is no such norm for CPUs)."""
    if device.type != "cuda" or processes == 1:
        return network
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)


def _cross_entropy(scores: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    enlarged = F.interpolate(scores.float(), size=masks.shape[-2:], mode="bilinear", align_corners=False)
    summed = F.cross_entropy(enlarged, masks, ignore_index=IGNORED, reduction="sum")
    return summed / (masks != IGNORED).sum().clamp(
        min=1
    )  # a batch in which nothing counts has a loss of 0, not of 0 / 0


def _doubled(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)


def _heads(width: int, classes: int, channels: int) -> tuple[nn.Module, nn.Module]:
    try:
        from transformers import UperNetConfig  # noqa: PLC0415 - an extra, and slow to import
        from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead  # noqa: PLC0415
    except ImportError as error:
        raise InputError("UperNet's heads come with transformers; pip install 'fastmae[segment]'") from error
    described: dict[str, Any] = {"hidden_size": channels, "num_labels": classes, "pool_scales": POOLS}
    sizes = UperNetConfig(**described, auxiliary_channels=AUXILIARY_CHANNELS, auxiliary_num_convs=1)
    heads: list[Any] = [UperNetHead(sizes, [width] * 4), UperNetFCNHead(sizes, [width] * 4, in_index=AUXILIARY_MAP)]
    for head in heads:
        nn.init.normal_(head.classifier.weight, std=CLASSIFIER_DEVIATION)
        nn.init.zeros_(head.classifier.bias)
        head.classifier = nn.Sequential(nn.Dropout2d(DROPOUT), head.classifier)
    return heads[0], heads[1]

"""UperNet on a ViT (Xiao et al. 2018; on plain ViTs as in BEiT and MAE): maps of four blocks, a pyramid, two heads.

On any other network, the maps are those of its own stages, and it needs no pyramid.

The heads are transformers' own, which need no mmcv. transformers has no pyramid for plain ViTs; it is in this file.

Shapes: B images of H x W pixels, P the patch size, D the encoder's width, C classes. The pyramid's maps have the
strides P/4, P/2, P and 2P.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import nn

from fastmae.errors import InputError
from fastmae.evaluate.segmentation.inference import resize_scores
from fastmae.evaluate.segmentation.masks import IGNORED
from fastmae.evaluate.stages import Stages
from fastmae.runtime.average_pool import AveragePool
from fastmae.student.encoder import Encoder

TAPS = (1 / 3, 1 / 2, 2 / 3, 1)
"""Depths at which maps are taken, as shares of the blocks: after blocks 4, 6, 8 and 12 of 12."""
POOL_GRIDS = (1, 2, 3, 6)
"""Grids to which pyramid pooling reduces the last map."""
AUXILIARY_CHANNELS = 256
AUXILIARY_MAP = 2
"""Index of the map that the auxiliary head reads."""
AUXILIARY_WEIGHT = 0.4
"""Weight of the auxiliary loss."""
USED_PARTS = {"patch_embed", "norm_pre", "blocks", "rope"}
"""Parts of timm's ViTs that the maps pass through."""
DROPOUT = 0.1
"""Probability with which each channel is dropped before the classifiers."""
CLASSIFIER_STD = 0.01
"""Standard deviation of the classifiers' initial weights."""


def tapped_blocks(depth: int) -> list[int]:
    """Blocks, counted from 1, after which the four maps are taken; fewer than four blocks give several maps each."""
    return [max(1, round(depth * share)) for share in TAPS]


class FeaturePyramid(nn.Module):
    """Four maps of one size -> maps four times and twice as large, as large, and half as large.

    Args:
        width: D, the maps' channels.
    """

    def __init__(self, width: int):
        super().__init__()
        self.times_4 = nn.Sequential(_upsample(width), nn.BatchNorm2d(width), nn.GELU(), _upsample(width))
        self.times_2 = _upsample(width)
        self.halved = nn.MaxPool2d(2)

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Four maps [B, D, h, w] -> [B, D, 4h, 4w], [B, D, 2h, 2w], [B, D, h, w], [B, D, h // 2, w // 2]."""
        first, second, third, fourth = maps
        return [self.times_4(first), self.times_2(second), third, self.halved(fourth)]


class UperNet(nn.Module):
    """The encoder with the pyramid and both heads.

    Args:
        encoder: a timm ViT that takes images of any multiple of its patch size, or another network with `stages`.
        num_classes: C.
        head_channels: width of the main head.
        stages: of a network that is no plain ViT, from `trainable_stages`; they are read instead of a ViT's blocks.

    Raises:
        InputError: transformers is not installed.
    """

    def __init__(self, encoder: Encoder, num_classes: int, head_channels: int, stages: Stages | None = None):
        super().__init__()
        self.encoder: Encoder = encoder
        self.stages = stages
        if stages is not None:
            self.head, self.auxiliary = _heads(stages.widths, num_classes, head_channels)
            return
        self.taps = [block - 1 for block in tapped_blocks(len(encoder.blocks))]
        width = int(encoder.embed_dim)
        self.pyramid = FeaturePyramid(width)
        self.head, self.auxiliary = _heads([width] * len(TAPS), num_classes, head_channels)
        for name, part in encoder.named_children():
            if name not in USED_PARTS:  # the final norm: kept in checkpoints for later use, but not trained (BEiT)
                part.requires_grad_(False)
        if encoder.pos_embed is not None:
            encoder.pos_embed.requires_grad_(True)  # fixed in masked pre-training

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class scores of the main head, [B, C, 4H/P, 4W/P], and of the auxiliary head, [B, C, H/P, W/P].

        Args:
            images: float [B, K, H, W], normalised; H and W are multiples of P, and at least 2P.
        """
        maps = self._block_maps(images) if self.stages is None else self.stages.maps(self.encoder, images)
        return self.head(maps), self.auxiliary(maps)

    def _block_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        blocks = sorted(set(self.taps))
        block_maps = self.encoder.forward_intermediates(
            images, indices=blocks, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        return self.pyramid([block_maps[blocks.index(block)] for block in self.taps])


def segmentation_loss(scores: tuple[torch.Tensor, torch.Tensor], masks: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cross-entropy of both heads at the masks' resolution: `loss` = `decode_loss` + 0.4 `auxiliary_loss`.

    Args:
        scores: of both heads, [B, C, h, w] of any size.
        masks: uint8 [B, H, W]; 255 is ignored.
    """
    decode, auxiliary = (_cross_entropy(head_scores, masks.long()) for head_scores in scores)
    return {"loss": decode + AUXILIARY_WEIGHT * auxiliary, "decode_loss": decode, "auxiliary_loss": auxiliary}


def sync_batch_norms(network: nn.Module, device: torch.device, processes: int) -> nn.Module:
    """Compute the batch norms' statistics over all processes. SyncBatchNorm exists for GPUs only."""
    if device.type != "cuda" or processes == 1:
        return network
    return convert_sync_batchnorm(network)  # torch's own would drop the activations in timm's batch norms


def _cross_entropy(scores: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    resized = resize_scores(scores, (masks.shape[-2], masks.shape[-1]))
    if torch.are_deterministic_algorithms_enabled():  # which GPUs have for rows of scores, but not for maps of them
        resized, masks = resized.movedim(1, -1).flatten(0, -2), masks.flatten()
    total = F.cross_entropy(resized, masks, ignore_index=IGNORED, reduction="sum")
    num_pixels = (masks != IGNORED).sum()
    return total / num_pixels.clamp(min=1)  # a batch of ignored pixels has a loss of 0, not 0 / 0


def _upsample(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)


def _heads(widths: Sequence[int], num_classes: int, channels: int) -> tuple[nn.Module, nn.Module]:
    try:
        from transformers import UperNetConfig  # noqa: PLC0415 - an extra, and slow to import
        from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead  # noqa: PLC0415 - the same
    except ImportError as error:
        raise InputError("UperNet's heads come with transformers; pip install 'fastmae[segment]'") from error
    main_head: dict[str, Any] = {"hidden_size": channels, "num_labels": num_classes, "pool_scales": POOL_GRIDS}
    config = UperNetConfig(**main_head, auxiliary_channels=AUXILIARY_CHANNELS, auxiliary_num_convs=1)
    heads: list[Any] = [
        UperNetHead(config, list(widths)),
        UperNetFCNHead(config, list(widths), in_index=AUXILIARY_MAP),
    ]
    for head in heads:
        nn.init.normal_(head.classifier.weight, std=CLASSIFIER_STD)
        nn.init.zeros_(head.classifier.bias)
        for module in head.modules():
            if isinstance(module, nn.AdaptiveAvgPool2d):
                module.__class__ = AveragePool  # its pools are in lists too, so they can't be replaced by name
        head.classifier = nn.Sequential(nn.Dropout2d(DROPOUT), head.classifier)
    return heads[0], heads[1]

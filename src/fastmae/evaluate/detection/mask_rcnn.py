"""Mask R-CNN (He et al. 2017) as torchvision has it, on a plain ViT; what here differs says why.

torchvision reads the strides of a pyramid off the sizes of its maps, rounded to powers of two, from the first batch; with patches of
14 pixels, or small images, those are not the true ones, so anchors and RoIAlign are told them. And its boxes take the type of the
heads' outputs: bf16 could not place them to the pixel, so heads give float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from fastmae.evaluate.detection.datasets import Limits, Targets
from fastmae.evaluate.detection.pyramid import PATCHES_A_STRIDE, ROI_LEVELS, SimplePyramid
from fastmae.runs.encoder import OpenedEncoder

ANCHOR_STRIDES = 8.0
"""Side of a level's square anchor, in its strides: 32 to 512 pixels with patches of 16, as in FPN."""
ASPECT_RATIOS = (0.5, 1.0, 2.0)
CANONICAL_PATCHES = 14.0
"""An object of that many patches' side is cut out of the encoder's own grid, as FPN cuts one of 224 pixels out of its stride 16."""
HEAD_CONVS = 4
"""Of the box head and of the mask head."""
FEATURES_A_CHANNEL = 4
"""Width of the box head's last layer: 1024 with 256 channels."""
BOX_GRID, MASK_GRID = 7, 14
SAMPLES = 2
"""Points a bin and side, of RoIAlign."""


def build_detector(opened: OpenedEncoder, classes: int, limits: Limits, channels: int) -> "Detector":
    """Mask R-CNN on an encoder that takes images of any size.

    In training `model(photos, targets)` gives the losses. In evaluation `model(photos)` gives for each photo boxes float32 [N, 4] in its
    own pixels, labels int64 [N], scores float32 [N] and masks float32 [N, 1, 28, 28], each over its box. Photos are uint8 [K, H, W].

    Args:
        opened: the encoder; its images' mean and deviation are used.
        classes: to be told apart, without background.
        limits: how large photos are given to the network.
        channels: of the maps and heads; 256 is the published width.
    """
    patch = opened.patch_size
    strides = tuple(patch * ratio for ratio in PATCHES_A_STRIDE)
    model = Detector(
        SimplePyramid(opened.network, channels),
        rpn_anchor_generator=StridedAnchors(strides),
        rpn_head=FullPrecisionRPNHead(channels, len(ASPECT_RATIOS), conv_depth=2),
        box_roi_pool=StridedRoIAlign(patch, BOX_GRID),
        box_head=FastRCNNConvFCHead(
            (channels, BOX_GRID, BOX_GRID),
            [channels] * HEAD_CONVS,
            [FEATURES_A_CHANNEL * channels],
            norm_layer=LayerNorm2d,
        ),
        box_predictor=FullPrecisionBoxes(FEATURES_A_CHANNEL * channels, classes + 1),
        mask_roi_pool=StridedRoIAlign(patch, MASK_GRID),
        mask_head=MaskRCNNHeads(channels, [channels] * HEAD_CONVS, 1, norm_layer=LayerNorm2d),
        mask_predictor=FullPrecisionMasks(channels, channels, classes + 1),
    )
    model.transform = PhotoTransform(limits, opened.mean, opened.std, 2 * patch)
    for part in (model.backbone.levels, model.rpn, model.roi_heads):
        part.to(
            memory_format=torch.channels_last
        )  # as LayerNorm over channels leaves the maps; DDP wants gradients laid out as weights
    return model


class Detector(MaskRCNN):
    """torchvision's, with its targets in `Targets`."""

    def forward(self, photos: list[Tensor], targets: Targets | None = None) -> Any:
        """See `build_detector`."""
        return super().forward(photos, None if targets is None else targets.objects)


class PhotoTransform(GeneralizedRCNNTransform):
    """torchvision's, for bytes, with images that stay apart, and without pasting masks.

    Pasted here, a hundred masks of a photo of 24 megapixels would take 10 GB; `masks.paste` puts them there one by one.
    """

    def __init__(self, limits: Limits, mean: tuple[float, ...], std: tuple[float, ...], size_divisible: int):
        super().__init__(limits.short, limits.long, list(mean), list(std), size_divisible=size_divisible)

    def normalize(self, image: Tensor) -> Tensor:
        """uint8 or float in [0, 1], [K, H, W]."""
        return super().normalize(image.float() / 255 if image.dtype == torch.uint8 else image)

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Any:
        """Each image with a margin to the right and below by which its sides are multiples of `size_divisible`, for `SimplePyramid`."""
        return [
            F.pad(image, (0, -image.shape[2] % size_divisible, 0, -image.shape[1] % size_divisible)) for image in images
        ]

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Boxes from the network's pixels to the photo's; sizes are (height, width). In training there are none."""
        if self.training:
            return result
        for found, shape, original in zip(result, image_shapes, original_image_sizes, strict=True):
            found["boxes"] = resize_boxes(found["boxes"], shape, original)
        return result


class StridedAnchors(AnchorGenerator):
    """Anchors of one size and three ratios a level, at the level's true stride.

    Args:
        strides: of the levels, in pixels.
    """

    def __init__(self, strides: tuple[float, ...]):
        super().__init__(tuple((ANCHOR_STRIDES * stride,) for stride in strides), (ASPECT_RATIOS,) * len(strides))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors of each image, float32 [all levels, 4]."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        sizes = [list(feature_map.shape[-2:]) for feature_map in feature_maps]
        anchors = torch.cat(
            self.grid_anchors(sizes, [[torch.full((), stride, device=device)] * 2 for stride in self.strides])
        )
        return [anchors] * len(image_list.image_sizes)


class StridedRoIAlign(MultiScaleRoIAlign):
    """RoIAlign out of the level that fits the object's size, at the level's true scale.

    Args:
        patch: pixels, of the encoder.
        output_size: side of what is cut out.
    """

    def __init__(self, patch: int, output_size: int):
        super().__init__(list(ROI_LEVELS), output_size, SAMPLES)
        strides = PATCHES_A_STRIDE[: len(ROI_LEVELS)]
        self.scales: Any = [1 / (patch * ratio) for ratio in strides]
        self.map_levels: Any = LevelMapper(0, len(strides) - 1, CANONICAL_PATCHES * patch, strides.index(1.0))


class FullPrecisionRPNHead(RPNHead):
    """torchvision's, with float32 outputs under mixed precision."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """As the parent's."""
        logits, deltas = super().forward(x)
        return [logit.float() for logit in logits], [delta.float() for delta in deltas]


class FullPrecisionBoxes(FastRCNNPredictor):
    """torchvision's, with float32 outputs under mixed precision."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As the parent's."""
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


class FullPrecisionMasks(MaskRCNNPredictor):
    """torchvision's, with float32 outputs under mixed precision."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the parent's name
        """As the parent's."""
        return super().forward(input).float()

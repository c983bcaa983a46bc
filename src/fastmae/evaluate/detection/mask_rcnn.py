"""Mask R-CNN (He et al. 2017) on an encoder: torchvision's, with the changes below.

- torchvision guesses the strides of the pyramid's maps from their sizes in the first batch, as powers of two. With
  patches of 14 pixels, or on small images, the guess is wrong; here anchors and RoIAlign get the true strides.
- torchvision's boxes take the dtype of the heads' outputs. bf16 can't place them to the pixel, so these outputs are
  cast to float32.
- Images are not padded to a common size, and masks are not pasted into whole images; see `PhotoTransform`.
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

from fastmae.evaluate.detection.datasets import SizeLimits, Targets
from fastmae.evaluate.detection.pyramid import (
    ROI_LEVELS,
    STRIDES_IN_PATCHES,
    Pyramid,
    SimplePyramid,
    StagePyramid,
    patch_of_pyramid,
)
from fastmae.evaluate.stages import trainable_stages
from fastmae.runs.encoder import OpenedEncoder

ANCHOR_STRIDES = 8.0
"""Side of a map's square anchor, in its strides: 32 to 512 pixels with patches of 16, as in FPN."""
ASPECT_RATIOS = (0.5, 1.0, 2.0)
CANONICAL_PATCHES = 14.0
"""Side, in patches, of an object that RoIAlign reads from the encoder's own grid; FPN reads 224 pixels at stride 16."""
HEAD_CONVS = 4
"""Number of convolutions in the box head and in the mask head."""
BOX_FEATURES_PER_CHANNEL = 4
"""Width of the box head's last layer: 1024 for 256 channels."""
BOX_GRID, MASK_GRID = 7, 14
SAMPLING_RATIO = 2
"""RoIAlign's sampling points along each side of a bin."""


def build_detector(opened: OpenedEncoder, num_classes: int, limits: SizeLimits, channels: int) -> "Detector":
    """Mask R-CNN on an encoder that takes images of any size.

    Photos are uint8 [K, H, W]. In training, `model(photos, targets)` gives the five losses. In evaluation,
    `model(photos)` gives for each photo `boxes` float32 [N, 4] in its own pixels, `labels` int64 [N], `scores` float32
    [N], and `masks` float32 [N, 1, 28, 28], each over its box.

    Args:
        opened: the encoder; photos are normalised by its mean and std.
        num_classes: number of classes without background.
        limits: size of the photos for the network.
        channels: width of the maps and heads; 256 is the published one.
    """
    patch = patch_of_pyramid(opened)
    if opened.is_vit:
        pyramid: Pyramid = SimplePyramid(opened.network, channels)
    else:
        pyramid = StagePyramid(opened.network, channels, trainable_stages(opened))
    features = BOX_FEATURES_PER_CHANNEL * channels
    model = Detector(
        pyramid,
        rpn_anchor_generator=StridedAnchors(tuple(patch * stride for stride in STRIDES_IN_PATCHES)),
        rpn_head=RPNHead(channels, len(ASPECT_RATIOS), conv_depth=2),
        box_roi_pool=StridedRoIAlign(patch, BOX_GRID),
        box_head=FastRCNNConvFCHead(
            (channels, BOX_GRID, BOX_GRID), [channels] * HEAD_CONVS, [features], norm_layer=LayerNorm2d
        ),
        box_predictor=FastRCNNPredictor(features, num_classes + 1),
        mask_roi_pool=StridedRoIAlign(patch, MASK_GRID),
        mask_head=MaskRCNNHeads(channels, [channels] * HEAD_CONVS, 1, norm_layer=LayerNorm2d),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1),
    )
    model.transform = PhotoTransform(limits, opened.mean, opened.std, 2 * patch)
    for head in (model.rpn.head, model.roi_heads.box_predictor, model.roi_heads.mask_predictor):
        head.register_forward_hook(_cast_outputs_to_float32)
    for part in (model.backbone.levels, model.rpn, model.roi_heads):
        # LayerNorm over channels leaves the maps in this layout, and DDP wants gradients laid out like their weights.
        part.to(memory_format=torch.channels_last)
    return model


def _cast_outputs_to_float32(_module: torch.nn.Module, _inputs: Any, outputs: Any) -> Any:
    """A forward hook, for outputs that are a tensor or nested lists and tuples of them."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    return type(outputs)(_cast_outputs_to_float32(_module, _inputs, output) for output in outputs)


class Detector(MaskRCNN):
    """torchvision's Mask R-CNN with its targets wrapped in `Targets`."""

    def forward(self, photos: list[Tensor], targets: Targets | None = None) -> Any:
        """See `build_detector`."""
        return super().forward(photos, None if targets is None else targets.objects)


class PhotoTransform(GeneralizedRCNNTransform):
    """torchvision's transform for uint8 photos; it keeps images apart and leaves masks over their boxes.

    A hundred masks pasted into a photo of 24 megapixels take 10 GB; `masks.paste` pastes them one by one instead.

    Args:
        limits: size of the photos for the network.
        mean: of each channel, for values in [0, 1].
        std: of each channel, for values in [0, 1].
        size_divisible: number of pixels that the sides are padded to a multiple of.
    """

    def __init__(self, limits: SizeLimits, mean: tuple[float, ...], std: tuple[float, ...], size_divisible: int):
        super().__init__(limits.short, limits.long, list(mean), list(std), size_divisible=size_divisible)

    def normalize(self, image: Tensor) -> Tensor:
        """uint8, or float in [0, 1], [K, H, W] -> float32 [K, H, W]."""
        return super().normalize(image.float() / 255 if image.dtype == torch.uint8 else image)

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Any:
        """A list of the images, each padded on the right and below to multiples of `size_divisible`."""
        return [
            F.pad(image, (0, -image.shape[2] % size_divisible, 0, -image.shape[1] % size_divisible)) for image in images
        ]

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Scale the boxes from the network's pixels to the photo's. Sizes are (height, width)."""
        if self.training:  # there are no results then
            return result
        for detected, shape, original in zip(result, image_shapes, original_image_sizes, strict=True):
            detected["boxes"] = resize_boxes(detected["boxes"], shape, original)
        return result


class StridedAnchors(AnchorGenerator):
    """Anchors of one size and three aspect ratios for each map, at the map's true stride.

    Args:
        strides: of the maps, in pixels.
    """

    def __init__(self, strides: tuple[float, ...]):
        super().__init__(tuple((ANCHOR_STRIDES * stride,) for stride in strides), (ASPECT_RATIOS,) * len(strides))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors of each image on all maps, float32 [A, 4]."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        grids = [list(feature_map.shape[-2:]) for feature_map in feature_maps]
        strides = [[torch.full((), stride, device=device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors(grids, strides))
        return [anchors] * len(image_list.image_sizes)


class StridedRoIAlign(MultiScaleRoIAlign):
    """RoIAlign that reads each object from the map that fits its size, at the map's true scale.

    Args:
        patch_size: the encoder's, in pixels.
        output_size: side of the result, in bins.
    """

    def __init__(self, patch_size: int, output_size: int):
        super().__init__(list(ROI_LEVELS), output_size, SAMPLING_RATIO)
        strides = STRIDES_IN_PATCHES[: len(ROI_LEVELS)]
        self.scales: Any = [1 / (patch_size * stride) for stride in strides]
        self.map_levels: Any = LevelMapper(0, len(strides) - 1, CANONICAL_PATCHES * patch_size, strides.index(1.0))

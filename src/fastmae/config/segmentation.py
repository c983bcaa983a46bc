"""Options of `segment`."""

from dataclasses import dataclass
from typing import Literal

from fastmae.config.downstream import SupervisedConfig


@dataclass(kw_only=True)
class SegmentConfig(SupervisedConfig):
    """Semantic segmentation: train UperNet on the encoder with a mask for each photo, measure mIoU on val (Table 7).

    DATA has images/{train,val}/X.jpg and masks/{train,val}/X.png (class ids, 255 = ignored; classes.json may name them), or ADE20K's
    own images/{training,validation} and annotations/{training,validation}.
    """

    layer_decay: float = 0.65
    """Each block learns so much slower than the one above it."""
    drop_path: float = 0.1
    """Rate of stochastic depth at the last block, growing linearly from 0 at the first."""

    crop_size: int | None = None
    """Side of a training crop and of a window, in pixels. Default: the largest multiple of the patch that is neither over 512 nor over
    the photos' shorter side (their median)."""
    short_side: int | None = None
    """Pixels to which a photo's shorter side is brought before it is cropped or evaluated; the masks that are measured against keep
    their size. 0: photos stay as they are. Default: --crop-size, as the recipe for ADE20K has it."""
    head_channels: int | None = None
    """Width of UperNet's head. Default: the encoder's own, so 768 on a ViT-B."""
    inference: Literal["slide", "whole"] = "slide"
    """Windows of --crop-size, each two thirds of it further, their scores averaged; or all of a photo at once."""
    pictures: int = 6
    """Rows of predictions.png; 0: none."""

"""Options of `fastmae segment`."""

from typing import Annotated, ClassVar, Literal

from fastmae.config.common import PIXELS
from fastmae.config.options import options
from fastmae.config.ranges import FRACTION, HEAD_WIDTH, PICTURES, Range
from fastmae.config.supervised import SupervisedConfig


@options
class SegmentConfig(SupervisedConfig):
    """Semantic segmentation: train UperNet on the encoder with a mask for each photo, measure mIoU on val (Table 7).

    DATA has images/{train,val}/X.jpg and masks/{train,val}/X.png (class ids, 255 = ignored; classes.json may name
    them), or ADE20K's own images/{training,validation} and annotations/{training,validation}.
    """

    may_change: ClassVar[tuple[str, ...]] = (*SupervisedConfig.may_change, "pictures")

    layer_decay: Annotated[float, Range(gt=0, le=1)] = 0.65
    """Each block's learning rate, as a fraction of that of the block above it."""
    drop_path: Annotated[float, FRACTION] = 0.1
    """Rate of stochastic depth at the last block, growing linearly from 0 at the first."""
    crop_size: Annotated[int | None, PIXELS] = None
    """Side of a training crop and of an inference window in pixels. Default: the largest multiple of the patch size
    that exceeds neither 512 nor the median shorter side of the photos."""
    short_side: Annotated[int | None, Range(ge=0, le=16384)] = None
    """Length in pixels to which a photo's shorter side is resized before it is cropped or evaluated; the masks used for
    the evaluation keep their size. 0: no resizing. Default: --crop-size, as in the recipe for ADE20K."""
    head_channels: Annotated[int | None, HEAD_WIDTH] = None
    """Width of UperNet's head. Default: the encoder's own, so 768 on a ViT-B."""
    inference: Literal["slide", "whole"] = "slide"
    """Average the scores of windows of --crop-size, each shifted by two thirds of it; or use the whole photo."""
    pictures: Annotated[int, PICTURES] = 6
    """Rows of predictions.png; 0: no picture."""

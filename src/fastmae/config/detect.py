"""Options of `fastmae detect`."""

from pathlib import Path
from typing import Annotated, ClassVar

from fastmae.config.common import PIXELS
from fastmae.config.options import options
from fastmae.config.ranges import FRACTION, HEAD_WIDTH, PICTURES, Range
from fastmae.config.supervised import SupervisedConfig


@options
class DetectConfig(SupervisedConfig):
    """Train Mask R-CNN on the encoder: boxes and masks of objects, measured as in COCO (Sec. 4.1.5, Table 8)."""

    may_change: ClassVar[tuple[str, ...]] = (*SupervisedConfig.may_change, "pictures")

    data: Path
    """COCO's own layout (annotations/instances_{train,val}2017.json, train2017/, val2017/), or two folders whose names
    end in train and val, each with images/ and annotations.json in COCO's format."""
    layer_decay: Annotated[float, Range(gt=0, le=1)] = 0.75
    """Each block's learning rate, as a fraction of that of the block above it. (CAE's value; the paper gives none.)"""
    drop_path: Annotated[float, FRACTION] = 0.2
    """Rate of stochastic depth at the last block, growing linearly from 0 at the first. (Sec. 4.1.5)"""
    image_size: Annotated[int | None, PIXELS] = None
    """Shorter side of the images in pixels. Default: 800; with fewer than 10,000 images their median one, at most
    800."""
    max_size: Annotated[int | None, PIXELS] = None
    """Upper limit of the longer side in pixels; the shorter side shrinks to keep it. Default: 1333/800 of
    --image-size."""
    head_channels: Annotated[int, HEAD_WIDTH] = 256
    """Width of the feature pyramid and the heads; 64, say, on a small machine."""
    pictures: Annotated[int, PICTURES] = 6
    """Images of val/ drawn into detections.png after each evaluation; 0: no picture."""

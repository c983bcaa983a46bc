"""Options of `detect`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fastmae.config.downstream import SupervisedConfig


@dataclass(kw_only=True)
class DetectConfig(SupervisedConfig):
    """Train Mask R-CNN on the encoder: boxes and masks of objects, measured as COCO does (Sec. 4.1.5, Table 8)."""

    data: Positional[Annotated[Path, arg(metavar="DATA")]]
    """COCO's own layout (annotations/instances_{train,val}2017.json, train2017/, val2017/), or two folders whose names end in train and
    val, each with images/ and annotations.json in COCO's format."""
    layer_decay: float = 0.75
    """Each block learns so much slower than the one above it. (The paper leaves it open; CAE's.)"""
    drop_path: float = 0.2
    """Rate of stochastic depth at the last block, growing linearly from 0 at the first. (Sec. 4.1.5)"""
    image_size: int | None = None
    """Short side of the images for the network, in pixels. Default: 800; of fewer than 10,000 images their median one, at most 800."""
    max_size: int | None = None
    """Longest side; where it would be exceeded, the short one gives way. Default: 1333/800 of --image-size."""
    head_channels: int = 256
    """Width of the feature pyramid and the heads; 64, say, on a small machine."""
    checkpoint_activations: bool = False
    """Keep no activations of the encoder's blocks but compute them again: less memory, about a quarter more time."""
    pictures: int = 6
    """Images of val/ drawn into detections.png after each evaluation; 0: none."""

"""Options of `fastmae finetune`."""

from typing import Annotated, Literal

from fastmae.config.common import PIXELS
from fastmae.config.options import options
from fastmae.config.ranges import FRACTION, LEARNING_RATE_OR_0, MIXING, Range
from fastmae.config.supervised import SupervisedConfig


@options
class FinetuneConfig(SupervisedConfig):
    """Fine-tune a classifier by MAE's recipe: train on train/<class>/*, measure on val/<class>/* (Table 6)."""

    image_size: Annotated[int | None, PIXELS] = None
    """Side of the images in pixels. Default: the encoder's own."""
    pool: Literal["mean", "class"] = "mean"
    """A ViT's classifier reads the mean of the patch tokens, or the class token."""
    min_lr: Annotated[float, LEARNING_RATE_OR_0] = 1e-6
    """Learning rate at the end."""
    layer_decay: Annotated[float, Range(gt=0, le=1)] = 0.65
    """Each block's learning rate, as a fraction of that of the block above it."""
    drop_path: Annotated[float, FRACTION] = 0.1
    """Rate of stochastic depth at the last block, growing linearly from 0 at the first."""
    augment: Literal["full", "crop", "none"] = "full"
    """full: random crops, flips, RandAugment, erasing, mixup and cutmix, as below; crop: the first two; none: the
    centre crop."""
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment, in timm's notation; empty: none."""
    erasing: Annotated[float, FRACTION] = 0.25
    """Probability of random erasing."""
    mixup: Annotated[float, MIXING] = 0.8
    """Alpha of mixup; 0: none."""
    cutmix: Annotated[float, MIXING] = 1.0
    """Alpha of cutmix; 0: none."""
    smoothing: Annotated[float, FRACTION] = 0.1
    """Label smoothing."""

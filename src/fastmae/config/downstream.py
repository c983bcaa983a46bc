"""Options of the commands that train on labels what was pre-trained without, and what they share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fastmae.config.common import Common, Precision


@dataclass(kw_only=True)
class SupervisedConfig(Common):
    """What finetune, linear, segment and detect share. None: chosen by the recipe and the size of the data, and printed at the start."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """A run's folder or checkpoint, an exported model, a bare timm name (timm/NAME), or a checkpoint of MAE's, DINO's or iBOT's own."""
    data: Positional[Annotated[Path, arg(metavar="DATA")]]
    """The labelled data."""
    out: Path | None = None
    """Folder of what is trained here; the same call again continues an interrupted one."""
    pretrained: bool = True
    """--no-pretrained starts from the same encoder at random: the floor."""
    weights: Path | None = None
    """Weights file for a timm/NAME, instead of the hub's."""

    epochs: int | None = None
    """Passes over the training images."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up."""
    batch_size: int | None = None
    """Images a step, over all devices."""
    lr: float | None = None
    """Learning rate of a step at its highest (not per 256 images)."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    weight_decay: float = 0.05
    """AdamW's, on weights with two and more dimensions."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    layer_decay: float = 1.0
    """Each block learns so much slower than the one above it."""
    drop_path: float = 0.0
    """Rate of stochastic depth at the last block, growing linearly from 0 at the first."""
    clip_grad: float = 0.0
    """Largest norm of the gradient; 0: not clipped."""
    ema: float = 0.0
    """Decay of a moving average of the weights, 0.9999 say; it is then what is evaluated. 0: none."""

    eval_every: float | None = None
    """Epochs between evaluations on val/. Default: a tenth of the run, at least one."""
    micro_batch: int = 0
    """Most images that a device takes at once; gradients of the rest of its share are accumulated. 0: all of it."""
    precision: Precision = "auto"
    """auto: bf16-mixed on a GPU that has it, 16-mixed on another, 32-true elsewhere."""
    devices: int = 1
    """Processes on this machine, a device each; or start them with torchrun or srun."""
    workers: int = -1
    """Loading processes a device; -1: the cores but one, at most 8."""
    save_every: float = 10.0
    """Minutes between checkpoints."""
    log_every: int = 10
    """Steps between log entries."""
    resume: bool = True
    """Continue from the checkpoint in --out; --no-resume sets it aside and starts over."""


@dataclass(kw_only=True)
class FinetuneConfig(SupervisedConfig):
    """Fine-tune a classifier on labelled images by MAE's recipe: train/<class>/* teaches, val/<class>/* is measured (Table 6)."""

    image_size: int | None = None
    """Side in pixels; default: the encoder's own."""
    pool: Literal["mean", "class"] = "mean"
    """The classifier reads the mean of the patch tokens, or the class token."""
    min_lr: float = 1e-6
    """Learning rate at the end."""
    layer_decay: float = 0.65
    """Each block learns so much slower than the one above it."""
    drop_path: float = 0.1
    """Rate of stochastic depth at the last block, growing linearly from 0 at the first."""
    augment: Literal["full", "crop", "none"] = "full"
    """full: random crops, flips, RandAugment, erasing, mixup and cutmix, as below; crop: the first two; none: the middle crop."""
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's word for it; empty: none."""
    erasing: float = 0.25
    """Probability that a rectangle is replaced by noise."""
    mixup: float = 0.8
    """Alpha of mixup; 0: none."""
    cutmix: float = 1.0
    """Alpha of cutmix; 0: none."""
    smoothing: float = 0.1
    """Of the labels."""


@dataclass(kw_only=True)
class LinearConfig(SupervisedConfig):
    """Linear probe: frozen features, BatchNorm without affine, one linear layer, by MAE's recipe (Table 6)."""

    image_size: int | None = None
    """Side in pixels; default: the encoder's own."""
    pool: Literal["mean", "class"] = "mean"
    """Mean of the patch tokens, or the class token (MAE's)."""
    block: int | None = None
    """Which block's output, from 0, or negative from the end; default: the last. The final norm is applied in both cases."""
    weight_decay: float = 0.0
    """Of the linear layer."""
    augment: Literal["crop", "none"] = "none"
    """crop: random crops and flips, a forward of the encoder for each (MAE's); none: features are computed once and kept: minutes."""
    solver: Literal["lars", "logistic"] = "lars"
    """lars: MAE's optimiser; logistic: logistic regression to its end by scikit-learn, on features kept once."""

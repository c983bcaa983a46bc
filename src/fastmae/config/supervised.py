"""The options that the commands share that train on labels."""

from pathlib import Path
from typing import Annotated, ClassVar

from fastmae.config.options import options
from fastmae.config.ranges import BATCH, EPOCHS, EPOCHS_OR_0, FRACTION, LEARNING_RATE, Range
from fastmae.config.training import TrainingConfig


@options
class SupervisedConfig(TrainingConfig):
    """What finetune, linear, segment and detect share. None: chosen by the recipe and the size of the data."""

    may_change: ClassVar[tuple[str, ...]] = (*TrainingConfig.may_change, "data", "out")

    run: str
    """A run's folder or checkpoint, an exported model, timm/NAME, or a checkpoint of MAE, DINO or iBOT."""
    data: Path
    """The labelled data."""
    out: Path | None = None
    """Folder for the trained model. The same call again continues an interrupted one."""
    pretrained: bool = True
    """--no-pretrained starts from the same encoder with random weights: the lower bound."""
    weights: Path | None = None
    """Weights file for a timm/NAME, instead of the hub's."""

    epochs: Annotated[int | None, Range(ge=1, le=1_000_000)] = None
    """Passes over the training images."""
    warmup_epochs: Annotated[float | None, EPOCHS_OR_0] = None
    """Epochs of linear warm-up."""
    batch_size: Annotated[int | None, BATCH] = None
    """Images per step, over all devices."""
    lr: Annotated[float | None, LEARNING_RATE] = None
    """Peak learning rate of a step (not per 256 images)."""
    layer_decay: Annotated[float, Range(gt=0, le=1)] = 1.0
    """Each block's learning rate, as a fraction of that of the block above it."""
    drop_path: Annotated[float, FRACTION] = 0.0
    """Rate of stochastic depth at the last block, growing linearly from 0 at the first."""
    eval_every: Annotated[float | None, EPOCHS] = None
    """Epochs between evaluations on val/. Default: a tenth of the run, at least one."""

    inputs = ("data",)

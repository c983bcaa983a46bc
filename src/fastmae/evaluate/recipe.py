"""A published recipe, and the settings that follow from it for other data: what finetune, linear, segment, detect
share."""

import math
from dataclasses import dataclass

from fastmae.config import SupervisedConfig
from fastmae.training.task import Settings

MIN_STEPS = 2000
"""Steps that a small data set gets, through more epochs than the recipe's; but at most `MAX_EPOCHS`."""
MAX_EPOCHS = 300
MIN_STEPS_PER_EPOCH = 16
"""Reached through a smaller batch than the recipe's on a small data set."""


@dataclass(frozen=True)
class Recipe:
    """A published recipe.

    Attributes:
        images: number of training images that it was made for.
        epochs: passes over them.
        batch_size: images per step.
        lr: peak learning rate at that batch size.
        warmup_epochs: epochs of linear warm-up.
        lr_power: on small data, the learning rate grows with the batch size to this power. 0.5 is usual for AdamW; 0 is
            for LARS, whose steps are relative to the weights.
    """

    images: int
    epochs: int
    batch_size: int
    lr: float
    warmup_epochs: float
    lr_power: float = 0.5


def settle(config: SupervisedConfig, recipe: Recipe, images: int) -> Settings:
    """The settings for a number of training images: the options that were given, the others by the recipe.

    Data of at least a tenth of the recipe's size get the recipe's values, and a learning rate in proportion to the
    batch. Smaller data get a smaller batch (a power of two, so that an epoch has `MIN_STEPS_PER_EPOCH` steps), a
    learning rate that follows it by `lr_power`, more epochs if there would be fewer than `MIN_STEPS` steps, and the
    same share of warm-up.
    """
    small_batch = 2 ** int(math.log2(max(1, images / MIN_STEPS_PER_EPOCH)))
    batch_size = config.batch_size or min(recipe.batch_size, max(8, small_batch))
    epochs_for_min_steps = min(MAX_EPOCHS, math.ceil(MIN_STEPS * batch_size / images))
    epochs = config.epochs or max(recipe.epochs, epochs_for_min_steps)
    warmup_epochs = config.warmup_epochs
    if warmup_epochs is None:
        warmup_epochs = recipe.warmup_epochs * epochs / recipe.epochs
    lr_power = 1.0 if images >= recipe.images / 10 else recipe.lr_power
    lr = recipe.lr * (batch_size / recipe.batch_size) ** lr_power if config.lr is None else config.lr
    return Settings(images, epochs, batch_size, lr, warmup_epochs, config.eval_every or max(1.0, epochs / 10))

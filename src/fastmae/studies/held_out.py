"""The held-out fifth of train/: where a study tunes, and explores with --held-out, so that val/ stays untouched."""

import torch

from fastmae.errors import InputError
from fastmae.probes.labelled import LabelledFolder

EVERY = 5
"""One in so many images of a class is held out."""


def held_out_fifth(data: LabelledFolder, name: str) -> LabelledFolder:
    """Every fifth image of each class of train/ as the images to measure on, and the others as those that vote.

    The encoder may have seen the held-out images without their labels, as in pre-training on all of train/.

    Args:
        data: a labelled folder.
        name: its name, for messages.

    Raises:
        InputError: no class has five images.
    """
    is_held_out = torch.zeros(len(data.train), dtype=torch.bool)
    for label in range(len(data.classes)):
        of_class = (data.train_labels == label).nonzero().flatten()
        is_held_out[of_class[EVERY - 1 :: EVERY]] = True
    if not is_held_out.any():
        raise InputError(f"{name}: no class of train/ has {EVERY} images, so none can be held out")
    held_out = is_held_out.tolist()
    return LabelledFolder(
        classes=data.classes,
        train=[path for path, out in zip(data.train, held_out, strict=True) if not out],
        train_labels=data.train_labels[~is_held_out],
        val=[path for path, out in zip(data.train, held_out, strict=True) if out],
        val_labels=data.train_labels[is_held_out],
    )

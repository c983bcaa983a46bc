"""Labelled folders, train/<class>/* and val/<class>/*. What is wrong with them is reported before anything starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastmae.errors import InputError
from fastmae.images.sources import class_indices, labelled_split
from fastmae.runtime.progress import Progress


@dataclass(frozen=True)
class LabelledFolder:
    """The images and labels of both splits.

    Attributes:
        classes: names of the classes, sorted; a label is an index into them.
        train: image files.
        train_labels: int64 [len(train)].
        val: image files.
        val_labels: int64 [len(val)].
    """

    classes: list[str]
    train: list[Path]
    train_labels: torch.Tensor
    val: list[Path]
    val_labels: torch.Tensor

    def describe(self) -> dict[str, Any]:
        """For a run's description."""
        return {"classes": self.classes, "train": len(self.train), "val": len(self.val)}


def open_labelled(data: Path) -> LabelledFolder:
    """List both splits.

    Raises:
        InputError: a split is missing, a class is empty or only in val/, or there is only one class.
    """
    with Progress(f"list {data}", minor=True):
        train, train_names = labelled_split(data, "train")
        val, val_names = labelled_split(data, "val")
    classes = sorted(set(train_names))
    unknown = sorted(set(val_names) - set(classes))
    if unknown:
        raise InputError(f"{data / 'val' / unknown[0]}: a class that train/ does not have")
    if len(classes) < 2:
        raise InputError(f"{data / 'train'}: has one class only ('{classes[0]}'); give at least two")
    return LabelledFolder(classes, train, class_indices(train_names, classes), val, class_indices(val_names, classes))

"""Labelled folders: train/<class>/* and val/<class>/*."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastmae.errors import InputError
from fastmae.images.sources import labelled_split


@dataclass(frozen=True)
class LabelledFolder:
    """A folder's splits.

    Attributes:
        classes: names, sorted; a label is a place among them.
        train: files.
        train_labels: int64 [len(train)].
        val: files.
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
        InputError: a split is missing, a class is empty or in val/ alone, or there is but one class.
    """
    (train, train_names), (val, val_names) = (labelled_split(data, split) for split in ("train", "val"))
    classes = sorted(set(train_names))
    unknown = sorted(set(val_names) - set(classes))
    if unknown:
        raise InputError(f"{data / 'val' / unknown[0]}: a class that train/ does not have")
    if len(classes) < 2:
        raise InputError(f"{data / 'train'}: one class only ('{classes[0]}'); there is nothing to tell apart")
    places = {name: place for place, name in enumerate(classes)}
    train_labels, val_labels = (torch.tensor([places[name] for name in names]) for names in (train_names, val_names))
    return LabelledFolder(classes, train, train_labels, val, val_labels)

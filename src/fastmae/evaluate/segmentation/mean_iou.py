"""Pixels counted by their class and by what was said of them -> intersection over union, and accuracy. torchmetrics counts."""

from collections.abc import Sequence
from typing import Any

import torch

from fastmae.evaluate.segmentation.layout import IGNORED


def confusion_matrix(classes: int) -> Any:
    """torchmetrics' counter; its `compute` sums over the processes and gives int64 [C, C], true class by predicted class."""
    from torchmetrics.classification import MulticlassConfusionMatrix  # noqa: PLC0415 - slow to import

    return MulticlassConfusionMatrix(classes, ignore_index=IGNORED, validate_args=False)


def intersection_over_union(matrix: torch.Tensor) -> torch.Tensor:
    """Of each class, in percent: float64 [C]; not a number for a class of which there is no pixel.

    Args:
        matrix: [C, C], true class by predicted class.
    """
    counts = matrix.double()
    there, said, right = counts.sum(1), counts.sum(0), counts.diagonal()
    return torch.where(there > 0, 100 * right / (there + said - right), torch.nan)


def summary(matrix: torch.Tensor) -> dict[str, float]:
    """`miou`, the mean over the classes that occur, and `pixel_accuracy`, both in percent."""
    return {
        "miou": float(intersection_over_union(matrix).nanmean()),
        "pixel_accuracy": float(100 * matrix.diagonal().sum() / matrix.sum().clamp(min=1)),
    }


def table(names: Sequence[str], ious: Sequence[float | None]) -> str:
    """A line a class that occurs, the best first, and one line that names those that don't."""
    there = sorted(((-iou, number) for number, iou in enumerate(ious) if iou is not None))
    width = max((len(names[number]) for _, number in there), default=0)
    lines = [f"  {names[number]:{width}}  {-iou:5.1f}" for iou, number in there]
    absent = [name for name, iou in zip(names, ious, strict=True) if iou is None]
    if absent:
        lines.append(f"  not in the validation masks, so not in the mean: {', '.join(absent)}")
    return "\n".join(lines)

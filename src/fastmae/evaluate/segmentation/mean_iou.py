"""Mean intersection over union (mIoU) and pixel accuracy, from the confusion matrix that torchmetrics counts."""

from collections.abc import Mapping
from typing import Any

import torch

from fastmae.evaluate.segmentation.masks import IGNORED
from fastmae.runtime.table import text_table


def confusion_matrix(num_classes: int) -> Any:
    """torchmetrics' counter; `compute` sums over all processes: int64 [C, C], true class by predicted class."""
    from torchmetrics.classification import MulticlassConfusionMatrix  # noqa: PLC0415 - slow to import

    return MulticlassConfusionMatrix(num_classes, ignore_index=IGNORED, validate_args=False)


def intersection_over_union(matrix: torch.Tensor) -> torch.Tensor:
    """IoU of each class in percent, float64 [C]; NaN for a class without a true pixel.

    Args:
        matrix: [C, C], true class by predicted class.
    """
    counts = matrix.double()
    true, predicted, correct = counts.sum(1), counts.sum(0), counts.diagonal()
    return torch.where(true > 0, 100 * correct / (true + predicted - correct), torch.nan)


def miou_and_accuracy(matrix: torch.Tensor) -> dict[str, float]:
    """`miou`, the mean over the classes that occur, and `pixel_accuracy`, both in percent.

    Args:
        matrix: [C, C], true class by predicted class.
    """
    return {
        "miou": float(intersection_over_union(matrix).nanmean()),
        "pixel_accuracy": float(100 * matrix.diagonal().sum() / matrix.sum().clamp(min=1)),
    }


def iou_table(ious: Mapping[str, float | None]) -> str:
    """The classes from the best to the worst, and a last line with those that do not occur.

    Args:
        ious: IoU of each class in percent; None for a class without a true pixel. At least one is not None.
    """
    occurring = [(name, iou) for name, iou in ious.items() if iou is not None]
    occurring.sort(key=lambda entry: -entry[1])
    lines = [text_table([{"class": name, "IoU %": f"{iou:.1f}"} for name, iou in occurring])]
    absent = [name for name, iou in ious.items() if iou is None]
    if absent:
        lines.append(f"not in the validation masks, so not in the mean: {', '.join(absent)}")
    return "\n".join(lines)

"""Measuring a classifier: top-1 and top-5 accuracy, and which classes it confuses."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from fastmae.evaluate.drawing import label, png_bytes, text_as_it_is
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import take_first_buffers
from fastmae.runtime.wording import tells_top5
from fastmae.training.task import Evaluated, Picture

MAX_NAMED_CLASSES = 40
"""With more classes, the picture of the confusion matrix has no names."""


def shown_figures(classes: int) -> tuple[str, ...]:
    """The figures that are shown after an evaluation; all of them are logged."""
    return ("top1", "top5", "val_loss") if tells_top5(classes) else ("top1", "val_loss")


def measure_classifier(
    network: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    classes: list[str],
    fabric: Fabric,
    picture: Path,
) -> Evaluated:
    """`top1` and `top5` accuracy in percent and `val_loss`, over the batches of all processes.

    Args:
        network: [B, ...] -> scores [B, classes].
        batches: this process's images and labels.
        classes: names of the classes.
        fabric: of the run.
        picture: file for a picture of the confusion matrix.
    """
    from torchmetrics.classification import (  # noqa: PLC0415 - slow to import
        MulticlassAccuracy,
        MulticlassConfusionMatrix,
    )

    take_first_buffers(network, fabric)
    class_count = len(classes)
    top1 = MulticlassAccuracy(class_count, top_k=1, average="micro").to(fabric.device)
    top5 = MulticlassAccuracy(class_count, top_k=min(5, class_count), average="micro").to(fabric.device)
    confusion = MulticlassConfusionMatrix(class_count).to(fabric.device)
    loss_and_images = torch.zeros(2, device=fabric.device)
    for images, labels in batches:
        scores = network(images).float()
        for metric in (top1, top5, confusion):
            metric.update(scores, labels)
        loss_and_images[0] += F.cross_entropy(scores, labels, reduction="sum")
        loss_and_images[1] += len(labels)
    loss, image_count = cast(torch.Tensor, fabric.all_reduce(loss_and_images, reduce_op="sum")).tolist()
    counts = confusion.compute().cpu()
    figures = {
        "top1": round(100 * top1.compute().item(), 3),
        "top5": round(100 * top5.compute().item(), 3),
        "val_loss": round(loss / image_count, 5),
    }
    return Evaluated(figures, [Picture(picture, lambda: draw_confusion(counts, classes))])


@text_as_it_is()
def draw_confusion(counts: torch.Tensor, classes: Sequence[str]) -> bytes:
    """A confusion matrix, with the most frequent confusions in words: the bytes of a PNG file.

    Args:
        counts: int64 [C, C]: rows are true classes, columns predicted ones.
        classes: names of the C classes.
    """
    classes = [label(name) for name in classes]
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = min(11.0, 4.0 + 0.22 * len(classes))
    figure = Figure(figsize=(side + 1.0, side + 0.8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap=mpl.colormaps["Blues"], vmin=0, vmax=1)
    if len(classes) <= MAX_NAMED_CLASSES:
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
        axes.set_yticks(range(len(classes)), classes, fontsize=7)
        for true, predicted in counts.nonzero().tolist():
            colour = "white" if shares[true, predicted] > 0.5 else "black"
            text = str(int(counts[true, predicted]))
            axes.text(predicted, true, text, ha="center", va="center", fontsize=6, color=colour)
    axes.set(xlabel="predicted", ylabel="true", title=f"accuracy: {100 * counts.diag().sum() / counts.sum():.1f} %")
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the true class")
    confusions = most_confused(counts, classes)
    if confusions:
        figure.supxlabel("most frequent confusions:\n" + "\n".join(confusions), fontsize=8)
    return png_bytes(figure, dpi=120)


def most_confused(counts: torch.Tensor, classes: Sequence[str], most: int = 5) -> list[str]:
    """The most frequent confusions, as 'shirt for t-shirt (7)': predicted, true, and how often."""
    wrong = counts.clone()
    wrong.fill_diagonal_(0)
    largest = wrong.flatten().topk(min(most, wrong.numel()))
    pairs = [divmod(position, len(classes)) for position in largest.indices.tolist()]
    return [
        f"{classes[predicted]} for {classes[true]} ({count})"
        for (true, predicted), count in zip(pairs, largest.values.tolist(), strict=True)
        if count > 0
    ]

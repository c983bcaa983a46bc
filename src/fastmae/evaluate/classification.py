"""What a classifier is measured by: top-1 and top-5, and which classes it takes for which others."""

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from fastmae.runtime.durable import write_whole
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import on_first_process

NAMED_CLASSES = 40
"""Up to which the picture names them."""


def measure_classifier(
    network: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    classes: list[str],
    fabric: Fabric,
    picture: Path | None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent over all processes' batches.

    Args:
        network: [B, ...] -> scores [B, classes].
        batches: of this process.
        classes: their names.
        fabric: of the run.
        picture: where the confusion matrix is drawn to; None: it is not.
    """
    count = len(classes)
    top1 = MulticlassAccuracy(count, top_k=1, average="micro").to(fabric.device)
    top5 = MulticlassAccuracy(count, top_k=min(5, count), average="micro").to(fabric.device)
    confusion = MulticlassConfusionMatrix(count).to(fabric.device)
    total = torch.zeros(2, device=fabric.device)  # of the loss, and images
    for images, labels in batches:
        scores = network(images).float()
        for metric in (top1, top5, confusion):
            metric.update(scores, labels)
        total[0] += F.cross_entropy(scores, labels, reduction="sum")
        total[1] += len(labels)
    loss, seen = cast(torch.Tensor, fabric.all_reduce(total, reduce_op="sum")).tolist()
    counted = confusion.compute().cpu()
    if picture is not None:
        on_first_process(fabric, lambda: draw_confusion(counted, classes, picture))
    return {
        "top1": round(100 * top1.compute().item(), 3),
        "top5": round(100 * top5.compute().item(), 3),
        "val_loss": round(loss / seen, 5),
    }


def draw_confusion(counts: torch.Tensor, classes: list[str], path: Path) -> None:
    """Write a confusion matrix as a PNG: a row a true class, a column a predicted one, shares of the row; and the worst pairs in words.

    Args:
        counts: int64 [C, C], rows true.
        classes: C names.
        path: of the file.
    """
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = min(11.0, 4.0 + 0.22 * len(classes))
    figure = Figure(figsize=(side + 1.0, side + 0.8), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(shares.numpy(), cmap=mpl.colormaps["Blues"], vmin=0, vmax=1)
    if len(classes) <= NAMED_CLASSES:
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
        axes.set_yticks(range(len(classes)), classes, fontsize=7)
        for true, said in counts.nonzero().tolist():
            ink = "white" if shares[true, said] > 0.5 else "black"
            axes.text(said, true, str(int(counts[true, said])), ha="center", va="center", fontsize=6, color=ink)
    axes.set(xlabel="predicted", ylabel="true", title=f"right: {100 * counts.diag().sum() / counts.sum():.1f} %")
    figure.colorbar(drawn, ax=axes, shrink=0.7, label="share of the true class")
    worst = worst_pairs(counts, classes)
    if worst:
        figure.supxlabel("taken most often:\n" + "\n".join(worst), fontsize=8)
    write_whole(path, lambda aside: figure.savefig(aside, format="png", dpi=120))


def worst_pairs(counts: torch.Tensor, classes: list[str], most: int = 5) -> list[str]:
    """The confusions that occur most, as 'shirt for t-shirt (7)'."""
    wrong = counts.clone()
    wrong.fill_diagonal_(0)
    found = wrong.flatten().topk(min(most, wrong.numel()))
    places = [divmod(place, len(classes)) for place in found.indices.tolist()]
    return [
        f"{classes[said]} for {classes[true]} ({n})"
        for (true, said), n in zip(places, found.values.tolist(), strict=True)
        if n > 0
    ]

"""The vote of the k nearest neighbours (Wu et al. 2018; k = 20, T = 0.07 as in DINO)."""

import torch
import torch.nn.functional as F

CHUNK = 1024
"""Validation images compared with all training images at a time."""


def knn_accuracy(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    val: torch.Tensor,
    val_labels: torch.Tensor,
    classes: int,
    k: int,
    temperature: float,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy, in percent.

    The k training features of the largest cosine vote for their classes, each with the weight exp(cosine / temperature)
    (relative to the nearest one's, which changes no order and can't overflow).

    Args:
        train: float32 [n, D].
        train_labels: int64 [n].
        val: float32 [m, D].
        val_labels: int64 [m].
        classes: how many there are.
        k: neighbours; all of `train` where it has fewer.
        temperature: of the weights.
    """
    train, val = F.normalize(train, dim=1), F.normalize(val, dim=1)
    correct = torch.zeros(2)
    for part, labels in zip(val.split(CHUNK), val_labels.split(CHUNK), strict=True):
        cosine, nearest = (part @ train.T).topk(min(k, len(train)), dim=1)
        votes = torch.zeros(len(part), classes).scatter_add_(
            1, train_labels[nearest], ((cosine - cosine[:, :1]) / temperature).exp()
        )
        ranked = votes.topk(min(5, classes), dim=1).indices == labels[:, None]
        correct += torch.stack([ranked[:, 0].sum(), ranked.any(1).sum()])
    return tuple((100 * correct / len(val)).tolist())

"""The accuracy of a vote of the k nearest neighbours (Wu et al. 2018)."""

import torch
import torch.nn.functional as F

from fastmae.config import KnnConfig

CHUNK = 1024
"""Validation images that are compared with all training images at a time."""


def knn_accuracy(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    val: torch.Tensor,
    val_labels: torch.Tensor,
    classes: int,
    k: int = KnnConfig.k,
    temperature: float = KnnConfig.temperature,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy, in percent.

    The k training features with the largest cosine vote for their classes. The weight of a vote is
    exp(cosine / temperature), relative to that of the nearest neighbour, which changes no order and can't overflow.

    Args:
        train: float32 [n, D].
        train_labels: int64 [n].
        val: float32 [m, D].
        val_labels: int64 [m].
        classes: number of classes.
        k: number of neighbours; all of `train` if it has fewer.
        temperature: temperature of the weights.
    """
    train, val = F.normalize(train, dim=1), F.normalize(val, dim=1)
    correct = torch.zeros(2)
    for queries, labels in zip(val.split(CHUNK), val_labels.split(CHUNK), strict=True):
        cosines, nearest = (queries @ train.T).topk(min(k, len(train)), dim=1)
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        votes = torch.zeros(len(queries), classes).scatter_add_(1, train_labels[nearest], weights)
        hits = votes.topk(min(5, classes), dim=1).indices == labels[:, None]
        correct += torch.stack([hits[:, 0].sum(), hits.any(1).sum()])
    return tuple((100 * correct / len(val)).tolist())

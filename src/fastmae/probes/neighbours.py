"""The accuracy of a vote of the k nearest neighbours (Wu et al. 2018)."""

import torch
import torch.nn.functional as F

from fastmae.config import KnnConfig
from fastmae.runtime.progress import counted_through

CHUNK = 1024
"""Validation images that are searched for, and vote, at a time."""
BANK_CHUNK = 1 << 14
"""Training images that are searched at a time. Their cosines to a chunk of validation images take 67 MB."""


def knn_accuracy(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    val: torch.Tensor,
    val_labels: torch.Tensor,
    classes: int,
    k: int = KnnConfig.k,
    temperature: float = KnnConfig.temperature,
    device: torch.device | None = None,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy, in percent.

    The k training features with the largest cosine vote for their classes. The weight of a vote is
    exp(cosine / temperature), relative to that of the nearest neighbour, which changes no order and can't overflow.

    Args:
        train: float32 [n, D], on any device.
        train_labels: int64 [n].
        val: float32 [m, D].
        val_labels: int64 [m].
        classes: number of classes.
        k: number of neighbours; all of `train` if it has fewer.
        temperature: temperature of the weights.
        device: where to search and vote; None: where `train` is. The host waits for it once, at the end.
    """
    device = train.device if device is None else device
    cosines, nearest = nearest_neighbours(train, val, k, device)
    train_labels, val_labels = train_labels.to(device), val_labels.to(device)
    correct = torch.zeros(2, device=device)
    chunks = _chunks(len(val), CHUNK)
    for part in counted_through(chunks, "k-NN, votes", "chunks", len(chunks)):
        weights = ((cosines[part] - cosines[part, :1]) / temperature).exp()
        votes = torch.zeros(len(weights), classes, device=device)
        votes.scatter_add_(1, train_labels[nearest[part]], weights)
        hits = votes.topk(min(5, classes), dim=1).indices == val_labels[part, None]
        correct += torch.stack([hits[:, 0].sum(), hits.any(1).sum()])
    return tuple((100 * correct / len(val)).tolist())


def nearest_neighbours(
    train: torch.Tensor, val: torch.Tensor, k: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines and the rows of the k training features nearest to each of `val`, nearest first.

    Args:
        train: float32 [n, D]. Features on another device are moved by chunks, each chunk once.
        val: float32 [m, D].
        k: number of neighbours; all of `train` if it has fewer.
        device: where to search.

    Returns:
        float32 and int64, both [m, min(k, n)], on `device`.
    """
    k = min(k, len(train))
    cosines = torch.full((len(val), k), -torch.inf, device=device)
    rows = torch.zeros(len(val), k, dtype=torch.int64, device=device)
    banks = _chunks(len(train), BANK_CHUNK)
    for searched in counted_through(banks, "k-NN, search", "chunks", len(banks)):
        bank = F.normalize(train[searched].to(device), dim=1).T
        for part in _chunks(len(val), CHUNK):
            queries = F.normalize(val[part].to(device), dim=1)
            found, at = (queries @ bank).topk(min(k, bank.shape[1]), dim=1)
            candidates = torch.cat([rows[part], at + searched.start], dim=1)
            cosines[part], best = torch.cat([cosines[part], found], dim=1).topk(k, dim=1)
            rows[part] = candidates.gather(1, best)
    return cosines, rows


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]

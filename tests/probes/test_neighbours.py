"""k-NN accuracy against its formula, written out in plain loops."""

import math

import pytest
import torch

from fastmae.probes import neighbours
from fastmae.probes.neighbours import knn_accuracy, nearest_neighbours


def ranked_classes(train, labels, query, classes, k, temperature):
    """The classes of one query, best first: its k nearest neighbours by cosine vote with weight exp(cosine / T)."""
    cosine = [float(torch.dot(query, t) / (query.norm() * t.norm())) for t in train]
    nearest = sorted(range(len(train)), key=lambda i: -cosine[i])[:k]
    votes = [0.0] * classes
    for i in nearest:
        votes[labels[i]] += math.exp(cosine[i] / temperature)
    return sorted(range(classes), key=lambda c: -votes[c])


@pytest.mark.parametrize(("chunk", "bank_chunk"), [(1024, 1 << 14), (7, 1 << 14), (1024, 11), (7, 5)])
def test_the_accuracies_equal_the_formula_in_loops_whatever_the_chunk_sizes(chunk, bank_chunk, monkeypatch):
    monkeypatch.setattr(neighbours, "CHUNK", chunk)
    monkeypatch.setattr(neighbours, "BANK_CHUNK", bank_chunk)
    generator = torch.Generator().manual_seed(0)
    train, val = torch.randn(60, 5, generator=generator), torch.randn(40, 5, generator=generator)
    labels, truth = torch.randint(0, 8, (60,), generator=generator), torch.randint(0, 8, (40,), generator=generator)
    ranked = [ranked_classes(train, labels.tolist(), query, 8, 7, 0.07) for query in val]
    top1 = 100 * sum(r[0] == t for r, t in zip(ranked, truth.tolist(), strict=True)) / 40
    top5 = 100 * sum(t in r[:5] for r, t in zip(ranked, truth.tolist(), strict=True)) / 40
    assert knn_accuracy(train, labels, val, truth, 8, 7, 0.07) == pytest.approx((top1, top5))
    assert 0 < top1 < top5 < 100


def test_the_length_of_a_feature_does_not_matter():
    train, labels = torch.eye(6), torch.arange(6)
    assert knn_accuracy(train, labels, 3.0 * train, labels, 6, 1, 0.07) == (100.0, 100.0)
    assert knn_accuracy(train, labels, train, (labels + 1) % 6, 6, 1, 0.07)[0] == 0.0


def test_a_very_low_temperature_does_not_overflow():
    train, labels = torch.tensor([[1.0, 0.0], [0.99, 0.1]]), torch.tensor([0, 1])
    assert knn_accuracy(train, labels, train, labels, 2, 2, 1e-4) == (100.0, 100.0)


def test_k_may_exceed_the_training_images_and_there_may_be_fewer_than_five_classes():
    train, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    assert knn_accuracy(train, labels, train, labels, 2, 20, 0.07) == (100.0, 100.0)


@pytest.mark.parametrize("bank_chunk", [1 << 14, 13, 3])
def test_the_neighbours_are_those_of_one_search_over_everything_nearest_first(bank_chunk, monkeypatch):
    monkeypatch.setattr(neighbours, "BANK_CHUNK", bank_chunk)
    generator = torch.Generator().manual_seed(3)
    train, val = torch.randn(50, 6, generator=generator), torch.randn(9, 6, generator=generator)
    cosines, rows = nearest_neighbours(train, val, 4, torch.device("cpu"))
    expected = torch.nn.functional.cosine_similarity(val[:, None], train[None], dim=2).sort(dim=1, descending=True)
    assert torch.equal(rows, expected.indices[:, :4])
    assert torch.allclose(cosines, expected.values[:, :4], atol=1e-6)

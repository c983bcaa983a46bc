"""The figures of a classifier against torch's own, and its confusion matrix."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fastmae.evaluate.classification import measure_classifier, most_confused


def test_accuracies_and_loss_are_those_of_all_images_whatever_the_batches(fabric):
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(30, 8, generator=generator), torch.randint(0, 8, (30,), generator=generator)
    batches = zip(scores.split(7), labels.split(7), strict=True)
    figures = measure_classifier(nn.Identity(), batches, list("abcdefgh"), fabric, None)
    hits = scores.topk(5, dim=1).indices == labels[:, None]
    assert figures["top1"] == pytest.approx(100 * hits[:, 0].float().mean().item(), abs=1e-3)
    assert figures["top5"] == pytest.approx(100 * hits.any(1).float().mean().item(), abs=1e-3)
    assert figures["val_loss"] == pytest.approx(F.cross_entropy(scores, labels).item(), abs=1e-5)
    assert 0 < figures["top1"] < figures["top5"] < 100


def test_the_confusion_matrix_is_drawn(fabric, tmp_path):
    scores = torch.eye(3)
    measure_classifier(nn.Identity(), [(scores, torch.tensor([0, 1, 0]))], list("abc"), fabric, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 300


def test_the_most_frequent_confusions_come_first():
    counts = torch.tensor([[5, 3, 0], [0, 9, 1], [0, 0, 2]])
    assert most_confused(counts, ["a", "b", "c"]) == ["b for a (3)", "c for b (1)"]

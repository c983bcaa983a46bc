"""The figures of a classifier against torch's own, and its confusion matrix."""

import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fastmae.evaluate.classification import draw_confusion, measure_classifier, most_confused


def test_accuracies_and_loss_are_those_of_all_images_whatever_the_batches(fabric):
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(30, 8, generator=generator), torch.randint(0, 8, (30,), generator=generator)
    batches = zip(scores.split(7), labels.split(7), strict=True)
    figures = measure_classifier(nn.Identity(), batches, list("abcdefgh"), fabric, Path("unused")).figures
    hits = scores.topk(5, dim=1).indices == labels[:, None]
    assert figures["top1"] == pytest.approx(100 * hits[:, 0].float().mean().item(), abs=1e-3)
    assert figures["top5"] == pytest.approx(100 * hits.any(1).float().mean().item(), abs=1e-3)
    assert figures["val_loss"] == pytest.approx(F.cross_entropy(scores, labels).item(), abs=1e-5)
    assert 0 < figures["top1"] < figures["top5"] < 100


def test_the_confusion_matrix_is_drawn(fabric, tmp_path):
    scores, file = torch.eye(3), tmp_path / "a.png"
    evaluated = measure_classifier(nn.Identity(), [(scores, torch.tensor([0, 1, 0]))], list("abc"), fabric, file)
    assert [picture.file for picture in evaluated.pictures] == [file]
    with Image.open(io.BytesIO(evaluated.pictures[0].png())) as picture:
        assert min(picture.size) > 300


@pytest.mark.promise("saved")
@pytest.mark.filterwarnings("error")
def test_any_name_of_a_folder_can_be_drawn_as_a_class():
    names = [r"$x_{\frac$", "a$b$c", "猫 🐈", "_hidden", "half \udcff", "line\nbreak", 255 * "w"]
    counts = torch.arange(49).view(7, 7)
    assert draw_confusion(counts, names).startswith(b"\x89PNG")


def test_the_most_frequent_confusions_come_first():
    counts = torch.tensor([[5, 3, 0], [0, 9, 1], [0, 0, 2]])
    assert most_confused(counts, ["a", "b", "c"]) == ["b for a (3)", "c for b (1)"]

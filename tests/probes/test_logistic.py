import pytest
import torch

from fastmae.probes.logistic import linear_accuracy


@pytest.mark.parametrize("classes", [2, 7])
def test_separable_classes_are_all_recognised_whatever_the_scale_of_the_features(classes):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 16, generator=generator)
    labels = torch.arange(classes).repeat_interleave(20)
    scale, shift = torch.logspace(-3, 3, 16), 100.0
    train, val = (
        (centres[labels] + 0.1 * torch.randn(len(labels), 16, generator=generator)) * scale + shift for _ in range(2)
    )
    assert linear_accuracy(train, labels, val, labels, classes) == (100.0, 100.0)
    wrong = (labels + 1) % classes
    assert linear_accuracy(train, labels, val, wrong, classes)[0] == 0.0


def test_features_without_information_give_chance_accuracy():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(10).repeat(40)
    train, val = (torch.randn(400, 8, generator=generator) for _ in range(2))
    top1, top5 = linear_accuracy(train, labels, val, labels, 10)
    assert top1 < 20
    assert 35 < top5 < 65

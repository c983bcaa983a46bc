import math

import numpy as np
import pytest
import torch

from fastmae.evaluate.segmentation.mean_iou import (
    confusion_matrix,
    intersection_over_union,
    iou_table,
    miou_and_accuracy,
)


def test_miou_and_accuracy_follow_their_formulas_over_the_pixels_that_are_not_ignored():
    random = np.random.default_rng(0)
    masks = [random.choice([0, 1, 2, 4, 255], (7, 9 + n)).astype(np.uint8) for n in range(3)]  # 3 is never true
    predictions = [random.integers(0, 5, mask.shape) for mask in masks]
    counter = confusion_matrix(5)
    for mask, predicted in zip(masks, predictions, strict=True):
        counter.update(torch.from_numpy(predicted), torch.from_numpy(mask).long())

    true = np.concatenate([mask.ravel() for mask in masks])
    predicted = np.concatenate([prediction.ravel() for prediction in predictions])[true != 255]
    true = true[true != 255]
    expected = []
    for class_id in range(5):
        intersection = ((true == class_id) & (predicted == class_id)).sum()
        union = ((true == class_id) | (predicted == class_id)).sum()
        expected.append(100 * intersection / union if (true == class_id).any() else math.nan)
    matrix = counter.compute()
    np.testing.assert_allclose(intersection_over_union(matrix), expected)
    assert math.isnan(expected[3])
    figures = miou_and_accuracy(matrix)
    assert figures["miou"] == pytest.approx(np.nanmean(expected))
    assert figures["pixel_accuracy"] == pytest.approx(100 * (true == predicted).mean())


def test_correct_everywhere_is_100_and_nowhere_is_0():
    correct = torch.tensor([[5, 0], [0, 3]])
    assert miou_and_accuracy(correct) == {"miou": 100.0, "pixel_accuracy": 100.0}
    assert miou_and_accuracy(correct.flip(1)) == {"miou": 0.0, "pixel_accuracy": 0.0}


def test_the_table_starts_with_the_best_class_and_ends_with_those_that_do_not_occur():
    lines = iou_table({"sky": 10.0, "pole": None, "car": 90.04, "bus": 10.0}).splitlines()
    assert [line.split() for line in lines[1:4]] == [["car", "90.0"], ["sky", "10.0"], ["bus", "10.0"]]
    assert "pole" in lines[4]
    assert len(lines) == 5

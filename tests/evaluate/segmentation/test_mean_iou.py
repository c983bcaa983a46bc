import math

import numpy as np
import pytest
import torch

from fastmae.evaluate.segmentation.mean_iou import confusion_matrix, intersection_over_union, summary, table


def test_miou_and_accuracy_are_their_formulas_over_the_counted_pixels():
    random = np.random.default_rng(0)
    masks = [random.choice([0, 1, 2, 4, 255], (7, 9 + n)).astype(np.uint8) for n in range(3)]
    predictions = [
        random.integers(0, 5, mask.shape) for mask in masks
    ]  # 3 is predicted and never true; 255 is never predicted
    counter = confusion_matrix(5)
    for mask, predicted in zip(masks, predictions, strict=True):
        counter.update(torch.from_numpy(predicted), torch.from_numpy(mask).long())

    truth, said = (np.concatenate([part.ravel() for part in parts]) for parts in (masks, predictions))
    truth, said = truth[truth != 255], said[truth != 255]
    expected = []
    for number in range(5):
        together, either = ((truth == number) & (said == number)).sum(), ((truth == number) | (said == number)).sum()
        expected.append(100 * together / either if (truth == number).any() else math.nan)
    matrix = counter.compute()
    np.testing.assert_allclose(intersection_over_union(matrix), expected)
    assert math.isnan(expected[3])
    found = summary(matrix)
    assert found["miou"] == pytest.approx(np.nanmean(expected))
    assert found["pixel_accuracy"] == pytest.approx(100 * (truth == said).mean())


def test_right_everywhere_is_100_and_nowhere_is_0():
    right = torch.tensor([[5, 0], [0, 3]])
    assert summary(right) == {"miou": 100.0, "pixel_accuracy": 100.0}
    assert summary(right.flip(1)) == {"miou": 0.0, "pixel_accuracy": 0.0}


def test_the_table_goes_from_the_best_class_and_names_those_that_do_not_occur():
    lines = table(["sky", "pole", "car", "bus"], [10.0, None, 90.04, 10.0]).splitlines()
    assert lines == [
        "  car   90.0",
        "  sky   10.0",
        "  bus   10.0",
        "  not in the validation masks, so not in the mean: pole",
    ]

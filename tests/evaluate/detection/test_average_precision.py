"""COCO's figures for detections whose figures are known."""

from dataclasses import replace

import numpy as np
import pytest

from fastmae.evaluate.detection.average_precision import METRICS, Detections, average_precision
from fastmae.evaluate.detection.coco import find_splits, read_split


@pytest.fixture
def split(rectangles):
    return read_split(find_splits(rectangles())[0])


def perfect_detections(split):
    """The true objects, all with a score of 1."""
    detections = []
    for image in range(len(split)):
        indices = list(split.objects(image))
        masks = [split.mask(index) for index in indices]
        scores = np.ones(len(indices), dtype=np.float32)
        detections.append(Detections(image, split.labels[indices], scores, split.boxes[indices], masks))
    return detections


def test_perfect_detections_have_an_ap_of_100_and_no_detections_of_0(split):
    figures = average_precision(split, perfect_detections(split))
    assert set(figures) < set(METRICS)
    assert set(figures.values()) == {100.0}
    without_detections = average_precision(split, [])
    assert set(without_detections) == set(figures)
    assert set(without_detections.values()) == {0.0}


def test_there_is_no_figure_for_a_size_that_no_object_has(split):
    figures = average_precision(split, perfect_detections(split))
    assert (split.areas < 32**2).all()
    assert {"box_ap_small", "mask_ap_small"} <= set(figures)
    assert not {"box_ap_medium", "mask_ap_medium", "box_ap_large", "mask_ap_large"} & set(figures)
    large_objects = replace(split, areas=split.areas * 0 + 97**2)
    figures = average_precision(large_objects, perfect_detections(split))
    assert {"box_ap_large", "mask_ap_large"} <= set(figures)
    assert "box_ap_small" not in figures


def test_boxes_a_little_off_count_at_50_but_not_at_75(split):
    offset = np.array([0, 0, 6, 6], dtype=np.float32)
    shifted = [replace(detected, boxes=detected.boxes + offset) for detected in perfect_detections(split)]
    figures = average_precision(split, shifted)
    assert figures["box_ap_50"] == 100
    assert figures["box_ap_75"] < 100
    assert 0 < figures["box_ap"] < 100
    assert figures["mask_ap"] == 100


def test_objects_of_the_wrong_class_count_for_nothing(split):
    wrong = [replace(detected, labels=3 - detected.labels) for detected in perfect_detections(split)]
    assert average_precision(split, wrong)["box_ap"] == 0


def test_half_of_the_objects_detected_gives_an_ap_of_about_half(split):
    figures = average_precision(split, perfect_detections(split)[:2])
    assert figures["box_ap"] == pytest.approx(50, abs=1)  # COCO reads precision at 101 recalls
    assert figures["mask_ap"] == pytest.approx(50, abs=1)


def test_detections_in_a_crowd_count_neither_as_right_nor_as_wrong(rectangles):
    split = read_split(find_splits(rectangles(lambda content: content["annotations"][0].update(iscrowd=1)))[0])
    assert split.is_crowd.sum() == 1
    assert average_precision(split, perfect_detections(split))["box_ap"] == 100


def test_evaluation_prints_nothing(split, capsys):
    average_precision(split, perfect_detections(split))
    assert capsys.readouterr().out == ""

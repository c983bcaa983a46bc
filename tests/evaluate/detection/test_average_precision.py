"""COCO's figures for detections of which they are known."""

from dataclasses import replace

import numpy as np
import pytest

from fastmae.evaluate.detection.average_precision import METRICS, Detections, average_precision
from fastmae.evaluate.detection.coco import find_splits, read_split


@pytest.fixture
def split(rectangles):
    return read_split(find_splits(rectangles())[0])


def perfect(split):
    """The true objects, found with full confidence."""
    found = []
    for image in range(len(split)):
        places = list(split.objects(image))
        counts = [split.counts(place) for place in places]
        found.append(
            Detections(image, split.labels[places], np.ones(len(places), dtype=np.float32), split.boxes[places], counts)
        )
    return found


def test_perfect_detections_have_an_ap_of_100_and_none_of_0(split):
    figures = average_precision(split, perfect(split))
    assert set(figures) < set(METRICS)
    assert set(figures.values()) == {100.0}
    nothing = average_precision(split, [])
    assert set(nothing) == set(figures)
    assert set(nothing.values()) == {0.0}


def test_a_size_of_which_no_object_is_has_no_figure(split):
    figures = average_precision(split, perfect(split))
    assert (split.areas < 32**2).all()
    assert {"box_ap_small", "mask_ap_small"} <= set(figures)
    assert not {"box_ap_medium", "mask_ap_medium", "box_ap_large", "mask_ap_large"} & set(figures)
    large = average_precision(replace(split, areas=split.areas * 0 + 97**2), perfect(split))
    assert {"box_ap_large", "mask_ap_large"} <= set(large)
    assert "box_ap_small" not in large


def test_boxes_a_little_off_count_at_50_but_not_at_75(split):
    shifted = [replace(found, boxes=found.boxes + np.array([0, 0, 6, 6], dtype=np.float32)) for found in perfect(split)]
    figures = average_precision(split, shifted)
    assert figures["box_ap_50"] == 100
    assert figures["box_ap_75"] < 100
    assert 0 < figures["box_ap"] < 100
    assert figures["mask_ap"] == 100


def test_objects_of_the_wrong_class_count_for_nothing(split):
    wrong = [replace(found, labels=3 - found.labels) for found in perfect(split)]
    assert average_precision(split, wrong)["box_ap"] == 0


def test_half_of_the_objects_found_is_an_ap_of_about_half(split):
    figures = average_precision(split, perfect(split)[:2])
    assert figures["box_ap"] == pytest.approx(50, abs=1)  # COCO reads precision at 101 recalls
    assert figures["mask_ap"] == pytest.approx(50, abs=1)


def test_what_is_found_in_a_crowd_counts_neither_for_nor_against(rectangles):
    split = read_split(find_splits(rectangles(lambda content: content["annotations"][0].update(iscrowd=1)))[0])
    assert split.crowd.sum() == 1
    assert average_precision(split, perfect(split))["box_ap"] == 100


def test_evaluation_writes_nothing_to_standard_output(split, capsys):
    average_precision(split, perfect(split))
    assert capsys.readouterr().out == ""

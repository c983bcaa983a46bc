"""Masks from polygons and run lengths, compared with pixels."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from fastmae.evaluate.detection.masks import RunLengths, _read_compressed, area, decode, encode, outline, paste

SIZE = (20, 12)
BOX = (2, 3, 10, 6)
POLYGON = [[2, 3, 12, 3, 12, 9, 2, 9]]


def box_mask(box=BOX, size=SIZE):
    mask = np.zeros((size[1], size[0]), dtype=np.uint8)
    mask[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = 1
    return mask


def runs_of(mask):
    runs, last = [0], 0
    for value in mask.flatten(order="F").tolist():
        if value != last:
            runs.append(0)
            last = value
        runs[-1] += 1
    return runs


def compressed(mask):
    return coco_mask.encode(np.asfortranarray(mask))["counts"].decode()


def test_a_polygon_and_both_kinds_of_run_lengths_give_the_same_mask():
    expected = box_mask()
    for segmentation in (
        POLYGON,
        RunLengths((12, 20), runs_of(expected)),
        RunLengths((12, 20), compressed(expected)),
    ):
        counts = encode(segmentation, SIZE)
        assert (decode(counts, SIZE) == expected).all()
        assert area(counts, SIZE) == 60.0


def test_several_polygons_give_one_mask_and_polygons_of_two_points_give_none():
    other = [14, 0, 18, 0, 18, 4, 14, 4]
    counts = encode([*POLYGON, other, [1, 1, 5, 5]], SIZE)
    assert (decode(counts, SIZE) == box_mask() + box_mask((14, 0, 4, 4))).all()
    assert encode([[1, 1, 5, 5]], SIZE) is None
    assert encode([[]], SIZE) is None


def test_compressed_run_lengths_are_read_as_pycocotools_reads_them():
    rng = np.random.default_rng(0)
    for number in range(50):
        height, width = rng.integers(1, 200, 2)
        mask = (rng.random((height, width)) < rng.random()).astype(np.uint8)
        if number % 2:
            mask = np.repeat(mask[:, :1], width, axis=1)
        assert _read_compressed(compressed(mask)).tolist() == runs_of(mask)


@pytest.mark.promise("labels")
@pytest.mark.parametrize(
    ("size", "counts", "reason"),
    [
        ((20, 12), [240], r"of size \[20, 12\], the image is \[12, 20\]"),
        ((12, 20), [239], "239 pixels in all, the image has 240"),
        ((12, 20), [-1, 241], "not run lengths"),
        ((12, 20), [0.5, 239.5], "not run lengths"),
        ((12, 20), [1e300], "not run lengths"),
        ((12, 20), [0] * ((1 << 22) + 1), "more than 4,194,304 runs"),
        ((12, 20), compressed(box_mask())[:-1], "no string of run lengths"),
        ((12, 20), "", "0 pixels in all"),
        ((12, 20), "\u1234\x00o" * 9, "no string of run lengths"),
        ((12, 20), "o" * 2_000_000, "no string of run lengths"),
        ((12, 20), "o" * 10 + "0", "no string of run lengths"),
        ((12, 20), "0" * ((1 << 23) + 1), "more than 4,194,304 runs"),
    ],
)
@pytest.mark.timeout(10)
def test_run_lengths_that_dont_fit_the_image_are_refused_with_the_reason(size, counts, reason):
    with pytest.raises(ValueError, match=reason):
        encode(RunLengths(size, counts), SIZE)


@pytest.mark.promise("labels")
@pytest.mark.parametrize(
    ("polygon", "reason"), [([1, 2, 3, 4, 5, 6, 7], "x, y, x, y"), ([1, 2, 3, 4, 5, 1e9], "far outside")]
)
def test_a_polygon_that_does_not_fit_the_image_is_refused_with_the_reason(polygon, reason):
    with pytest.raises(ValueError, match=reason):
        outline([polygon], SIZE)


def test_the_outline_counts_the_pixels_along_the_edges_and_the_points():
    assert outline(POLYGON, SIZE) == 10 + 6 + 10 + 4
    assert outline([*POLYGON, []], SIZE) == outline(POLYGON, SIZE)


def test_a_mask_can_be_decoded_at_a_smaller_size():
    counts = encode(RunLengths((12, 20), runs_of(box_mask((4, 2, 8, 6)))), SIZE)
    assert (decode(counts, SIZE, (10, 6)) == box_mask((2, 1, 4, 3), (10, 6))).all()


def test_a_full_mask_covers_exactly_its_box():
    counts = paste(torch.ones(28, 28), (2.0, 3.0, 12.0, 9.0), SIZE)
    assert (decode(counts, SIZE) == box_mask()).all()
    assert (decode(paste(torch.ones(28, 28), (-5.0, -5.0, 40.0, 40.0), SIZE), SIZE) == 1).all()


def test_a_pixel_belongs_to_a_pasted_mask_if_its_centre_does():
    left_half = torch.zeros(28, 28)
    left_half[:, :14] = 1.0
    counts = paste(left_half, (2.4, 3.0, 12.4, 9.6), SIZE)
    assert (decode(counts, SIZE) == box_mask((2, 3, 5, 7))).all()  # up to x = 7.4, y = 9.6


@pytest.mark.parametrize("box", [(5.0, 5.0, 5.0, 9.0), (30.0, 2.0, 40.0, 8.0), (-9.0, 2.0, -3.0, 8.0)])
def test_a_box_without_pixels_gives_an_empty_mask(box):
    assert area(paste(torch.ones(28, 28), box, SIZE), SIZE) == 0

import numpy as np
import pytest

from fastmae.images.mirror import copy_reversed


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8, 12, 15, 16, 24, 42, 672])
def test_each_row_is_copied_backwards_whatever_its_length(width):
    rows = np.random.default_rng(width).integers(0, 256, (3, 5, width), np.uint8)
    out = np.zeros_like(rows)
    copy_reversed(rows, out)
    assert np.array_equal(out, rows[..., ::-1])


@pytest.mark.parametrize("left", [0, 1, 3, 8])
def test_rows_can_be_a_part_of_longer_ones(left):
    rows = np.random.default_rng(left).integers(0, 256, (3, 9, 40), np.uint8)
    memory = np.full((3, 9, 40), 7, np.uint8)
    copy_reversed(rows[:, 2:6, left : left + 24], memory[:, 2:6, left : left + 24])
    expected = np.full((3, 9, 40), 7, np.uint8)
    expected[:, 2:6, left : left + 24] = rows[:, 2:6, left : left + 24][..., ::-1]
    assert np.array_equal(memory, expected)

"""The contact sheet shows each image as it is stored, and what to compare it with."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.offline.contact_sheet import GAP, SIDE, Entry, contact_sheet_png, entries
from fastmae.offline.quality import Quality

pytestmark = pytest.mark.promise("values")


class PixelsOnly:
    """A store of four 2 x 2 pictures, each of other levels."""

    def pixels(self, number):
        return torch.tensor([[[10, 12], [14, 16]]], dtype=torch.uint8) + number

    def key(self, number):
        return f"{number}.png"


def test_few_levels_are_drawn_stretched_and_a_duplicate_beside_the_earlier_image():
    flat, dark, alike = entries(Quality(4, 4, [0], [1], [(3, 2)], None), PixelsOnly())
    assert (flat.beside, flat.reason) == (None, "one colour")
    assert dark.beside.tolist() == [[[0, 85], [170, 255]]]
    assert dark.reason == "levels 11 to 17; stretched"
    assert torch.equal(alike.beside, alike.picture - 1)
    assert (alike.name, alike.reason) == ("3.png", "like 2.png")


def test_pictures_of_any_number_of_channels_are_drawn_whatever_their_names():
    drawn = [
        Entry(torch.full((channels, 4, 4), 50 * channels, dtype=torch.uint8), None, name, "why")
        for channels, name in [(1, "a.png"), (2, "日本\udcff\n.png"), (3, "$x_{\\frac$"), (5, 300 * "long/"), (1, "")]
    ]
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet_png(drawn))))
    centre = GAP + SIDE // 2
    width = 2 * SIDE + 2 * GAP
    assert [sheet[centre, centre + column * width].tolist() for column in range(4)] == [
        [50] * 3,
        [100] * 3,
        [150] * 3,
        [250] * 3,
    ]

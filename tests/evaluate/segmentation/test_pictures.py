import io

import numpy as np
from PIL import Image

from fastmae.evaluate.segmentation.pictures import IGNORED_COLOUR, Shown, palette, sheet


def test_classes_have_colours_of_their_own():
    colours = palette(150)
    apart = np.abs(colours[:150, None] - colours[None, :150]).max(-1) + np.eye(150)
    assert apart.min() > 1 / 255
    few = palette(12)[:12]
    assert (np.abs(few[:, None] - few[None]).max(-1) + np.eye(12)).min() > 0.12
    assert np.allclose(palette(3)[[3, 255]], IGNORED_COLOUR)


def test_a_sheet_shows_the_photo_the_truth_the_prediction_and_a_legend():
    photo = np.full((40, 60, 3), 77, np.uint8)
    truth, predicted = np.zeros((80, 120), np.uint8), np.ones((80, 120), np.uint8)
    truth[:20] = 255
    for names in (("road", "sky"), tuple(f"a rather long name of class {number}" for number in range(150))):
        picture = Image.open(io.BytesIO(sheet([Shown(photo, truth, predicted)] * 2, names))).convert("RGB")
        held = {colour for _, colour in picture.getcolors(1 << 24)}
        for colour in (
            palette(len(names))[0],
            palette(len(names))[1],
            np.array(IGNORED_COLOUR),
            np.array([77 / 255] * 3),
        ):
            assert any(np.abs(np.array(other) - 255 * colour).max() <= 1 for other in held)

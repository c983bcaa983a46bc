import io

import numpy as np
from PIL import Image

from fastmae.evaluate.segmentation.pictures import IGNORED_COLOUR, Prediction, draw_predictions, palette


def test_all_classes_have_different_colours_and_few_have_very_different_ones():
    colours = palette(150)
    distances = np.abs(colours[:150, None] - colours[None, :150]).max(-1) + np.eye(150)
    assert distances.min() > 1 / 255
    few = palette(12)[:12]
    assert (np.abs(few[:, None] - few[None]).max(-1) + np.eye(12)).min() > 0.12
    assert np.allclose(palette(3)[[3, 255]], IGNORED_COLOUR)


def test_the_picture_holds_the_colours_of_the_photo_and_of_both_masks():
    photo = np.full((40, 60, 3), 77, np.uint8)
    true_ids, predicted_ids = np.zeros((80, 120), np.uint8), np.ones((80, 120), np.uint8)
    true_ids[:20] = 255
    predictions = [Prediction(photo, true_ids, predicted_ids)] * 2
    for names in (("road", "sky"), tuple(f"a rather long name of class {number}" for number in range(150))):
        picture = Image.open(io.BytesIO(draw_predictions(predictions, names))).convert("RGB")
        drawn_colours = np.array([colour for _, colour in picture.getcolors(1 << 24)])
        first, second = palette(len(names))[:2]
        for colour in (first, second, np.array(IGNORED_COLOUR), np.array([77 / 255] * 3)):
            assert np.abs(drawn_colours - 255 * colour).max(1).min() <= 1

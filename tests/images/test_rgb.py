import numpy as np
import pytest
from PIL import Image

from fastmae.images import rgb
from fastmae.images.rgb import pixels_of, to_rgb

VALUES = np.add.outer(np.arange(24) * 5, np.arange(40) * 3)
GRADIENT = np.stack([VALUES, VALUES[::-1], VALUES[:, ::-1]], -1).clip(0, 255).astype(np.uint8)


def pictures():
    """The same gradient in every mode that has its own conversion."""
    colours = Image.fromarray(GRADIENT)
    grey = GRADIENT[..., 0]
    clear = colours.convert("RGBA")
    clear.putalpha(Image.fromarray(GRADIENT[..., 1]))
    keyed = colours.copy()
    keyed.info["transparency"] = colours.getpixel((3, 4))
    palette = colours.quantize(16)
    palette.info["transparency"] = 2
    return {
        "RGB": colours,
        "keyed": keyed,
        "RGBA": clear,
        "LA": clear.convert("LA"),
        "P": palette,
        "1": colours.convert("1"),
        "CMYK": colours.convert("CMYK"),
        "LAB": Image.merge("LAB", colours.split()),
        "I;16": Image.fromarray(grey.astype(np.uint16) * 257),
        "I": Image.fromarray(grey.astype(np.int32) * 300),
        "F up to 1": Image.fromarray(grey.astype(np.float32) / 255),
        "F up to 255": Image.fromarray(grey.astype(np.float32)),
    }


@pytest.mark.parametrize("name", pictures())
def test_strips_give_the_same_pixels_as_the_whole_image_and_a_reduction_gives_their_means(name, monkeypatch):
    image = pictures()[name]
    whole = to_rgb(image)
    monkeypatch.setattr(rgb, "STRIP_PIXELS", 7 * 40)
    assert (np.asarray(to_rgb(image)) == np.asarray(whole)).all()
    reduced = np.asarray(to_rgb(image, factor=3)).astype(int)
    assert reduced.shape == (8, 14, 3)
    means = np.asarray(whole)[:, :39].reshape(8, 3, 13, 3, 3).mean((1, 3))
    assert abs(reduced[:, :13] - means).max() <= 0.6


@pytest.mark.parametrize("name", [name for name in pictures() if name not in ("keyed", "P")])
def test_the_values_of_an_image_are_read_in_strips(name, monkeypatch):
    image = pictures()[name]
    monkeypatch.setattr(rgb, "STRIP_PIXELS", 7 * 40)
    np.testing.assert_array_equal(pixels_of(image), np.asarray(image))

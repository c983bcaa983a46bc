"""Any image that Pillow reads -> 8-bit RGB, in strips: a large image is not copied as a whole between the two."""

import numpy as np
from PIL import Image, ImageCms

from fastmae.images.value_range import AUTO, by_type, to_8_bits

STRIP_PIXELS = 1 << 20
"""Pixels that are converted at a time."""


def to_rgb(image: Image.Image, value_range: str = AUTO, factor: int = 1) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB: 16-bit values are scaled, not clipped, and transparency becomes white.

    A large image is converted in strips, so that there are no copies of the whole between the two.

    Args:
        image: its pixels are loaded.
        value_range: how values of more than 8 bits become 8 bits (`value_range`).
        factor: whole number by which both sides are reduced, rounded up; each pixel is the mean of those it stands for.
    """
    if is_wide(image):
        values = pixels_of(image)
        image = Image.fromarray(by_type(values) if value_range == AUTO else to_8_bits(values, value_range))
        del values
    rows = max(1, STRIP_PIXELS // (image.width * factor)) * factor
    if rows >= image.height and factor == 1:
        return _to_rgb(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image if factor == 1 else image.reduce(factor)
    result = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        result.paste(_to_rgb(strip).reduce(factor), (0, top // factor))
    return result


def pixels_of(image: Image.Image) -> np.ndarray:
    """An image's values, [H, W] or [H, W, K]. Made in strips: Pillow gives NumPy a copy of a copy."""
    rows = max(1, STRIP_PIXELS // image.width)
    pixels = None
    for top in range(0, image.height, rows):
        strip = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        if pixels is None:
            pixels = np.empty((image.height, *strip.shape[1:]), strip.dtype)
        pixels[top : top + rows] = strip
    assert pixels is not None
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
        assert converted is not None
        return converted
    if image.has_transparency_data:
        on_white = Image.new("RGBA", image.size, "white")
        on_white.alpha_composite(image.convert("RGBA"))
        return on_white.convert("RGB")
    return image.convert("RGB")


def is_wide(image: Image.Image) -> bool:
    """Whether an image has grey values of more than 8 bits: integers (I;16, I) or floats."""
    return image.mode.startswith("I") or image.mode == "F"

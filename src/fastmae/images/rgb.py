"""A decoded picture of any Pillow mode -> 8-bit RGB, in bounded memory. Decoding itself is in `decode`."""

import math

import numpy as np
from PIL import Image, ImageCms

from fastmae.images.value_range import AUTO, Mapping, mapping_of

STRIP_PIXELS = 1 << 20
"""Pixels that are converted to RGB at a time."""


def is_wide(image: Image.Image) -> bool:
    """Whether an image has grey values of more than 8 bits: integers (I;16, I) or floats."""
    return image.mode.startswith("I") or image.mode == "F"


def to_rgb(image: Image.Image, factor: int = 1, value_range: str = AUTO) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB: 16-bit values are scaled, not clipped, and transparency becomes white.

    A large image is converted in strips, so that only one copy of it exists.

    Args:
        image: its pixels are loaded.
        factor: whole number by which both sides are reduced, rounded up; each pixel is the mean of those it stands for.
        value_range: as in `decode_image`.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image if factor == 1 else image.reduce(factor)
    rows = max(1, STRIP_PIXELS // (image.width * factor)) * factor
    strips = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    mapped: Mapping | None = None
    if is_wide(image):
        mapped = mapping_of((np.asarray(image.crop(strip)) for strip in strips), math.prod(image.size), value_range)
    if len(strips) == 1 and factor == 1:
        return _to_rgb(image, mapped)
    result = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for strip in strips:
        result.paste(_to_rgb(image.crop(strip), mapped).reduce(factor), (0, strip[1] // factor))
    return result


def _to_rgb(image: Image.Image, mapped: Mapping | None) -> Image.Image:
    """As `to_rgb`; `mapped` is there for an image of more than 8 bits."""
    if mapped is not None:
        return Image.fromarray(mapped(np.asarray(image))).convert("RGB")
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

"""The middle image (Sec. 3.2.3, Fig. 4b): each image resized to one fixed size, which is cut into whole patches.

The teacher sees each middle image once. Pre-training sees only patch-aligned views of it.
"""

from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from fastmae.images import jpeg
from fastmae.images.decode import decode_bands
from fastmae.images.rgb import STRIP_PIXELS
from fastmae.images.value_range import AUTO


@dataclass(frozen=True)
class MiddleImage:
    """A decoded and resized image.

    Attributes:
        pixels: uint8 [K, S, S] with K channels, exactly as a store returns them later: after JPEG, if it keeps JPEG.
        jpeg: uint8 [bytes], or None if the store keeps raw pixels.
        width: width of the original image, upright, in pixels.
        height: height of the original image, upright, in pixels.
    """

    pixels: torch.Tensor
    jpeg: torch.Tensor | None
    width: int
    height: int


def resize_whole(image: Image.Image, size: int) -> Image.Image:
    """Resize the whole image to `size` x `size`, ignoring its aspect ratio (bicubic, antialiased)."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size` and keep the central `size` x `size`: no distortion, but the rest is lost."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


RESIZE = {"whole": resize_whole, "center-crop": resize_and_crop}


def make_middle_image(
    file: BinaryIO,
    name: str,
    size: int,
    resize: str,
    jpeg_quality: int | None,
    channels: int = 3,
    value_range: str = AUTO,
) -> MiddleImage:
    """Decode an image file and resize it to the middle size.

    Args:
        file: open and seekable, positioned at its start.
        name: name of the image, for its suffix.
        size: side of the middle image, in pixels.
        resize: a key of `RESIZE`.
        jpeg_quality: quality from 1 to 100 of the JPEG (4:2:0) that the pixels go through; None keeps them raw.
        channels: number of channels, K; 1 or 3 for JPEG.
        value_range: how values of more than 8 bits become 8 bits.

    Raises:
        UndecodableError, OSError: as in `decode_bands`.
    """
    pixels, (width, height) = resized_pixels(file, name, size, resize, channels, value_range)
    if jpeg_quality is None:
        return MiddleImage(pixels, None, width, height)
    encoded = jpeg.encode(pixels, jpeg_quality)
    return MiddleImage(torch.from_numpy(jpeg.decode(encoded.numpy(), channels)), encoded, width, height)


def resized_pixels(
    file: BinaryIO, name: str, size: int, resize: str, channels: int, value_range: str = AUTO
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Pixels of an image file, uint8 [K, S, S], before any JPEG; and the original (width, height)."""
    bands, original_size = decode_bands(file, name, channels, at_least=size, value_range=value_range)
    return torch.cat([to_tensor(RESIZE[resize](band, size)) for band in bands]), original_size


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB -> uint8 [3, H, W]; a single band -> uint8 [1, H, W]. Made in strips, as NumPy is given a copy of a copy."""
    pixels = np.empty((len(image.getbands()), image.height, image.width), np.uint8)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[:, top : top + rows] = np.atleast_3d(np.asarray(strip)).transpose(2, 0, 1)
    return torch.from_numpy(pixels)

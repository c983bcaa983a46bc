"""The middle image (Sec. 3.2.3, Fig. 4b): every picture at one fixed size, cut into whole patches.

A teacher sees it once; pre-training never sees anything else of a picture than patch-aligned parts of it.
"""

from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from fastmae.images import jpeg
from fastmae.images.decode import decode_bands


@dataclass(frozen=True)
class MiddleImage:
    """A decoded and resized picture.

    Attributes:
        pixels: uint8 [K, S, S] of K channels, exactly what a store gives back later (so after JPEG, when it keeps JPEG).
        jpeg: uint8 [bytes], or None when the pixels are kept raw.
        width: of the picture itself, upright, in pixels.
        height: the same.
    """

    pixels: torch.Tensor
    jpeg: torch.Tensor | None
    width: int
    height: int


def resize_whole(image: Image.Image, size: int) -> Image.Image:
    """Resize the whole picture to `size` x `size`, whatever its shape (bicubic, antialiased)."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size` and keep the centre `size` x `size`: no distortion, but the rims are lost."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


RESIZE = {"whole": resize_whole, "center-crop": resize_and_crop}


def make_middle_image(
    file: BinaryIO, name: str, size: int, resize: str, jpeg_quality: int | None, channels: int = 3
) -> MiddleImage:
    """Decode a file and bring it to the middle size.

    Args:
        file: of the image, open, seekable, at its begin.
        name: the image's, for its suffix.
        size: side of the middle image, in pixels.
        resize: a key of `RESIZE`.
        jpeg_quality: 1 to 100: the pixels go through a JPEG (4:2:0) of this quality; None keeps them raw.
        channels: K; a JPEG holds 1 or 3.

    Raises:
        UndecodableError, OSError: as `decode_bands`.
    """
    pixels, (width, height) = resized_pixels(file, name, size, resize, channels)
    if jpeg_quality is None:
        return MiddleImage(pixels, None, width, height)
    kept = jpeg.encode(pixels, jpeg_quality)
    return MiddleImage(torch.from_numpy(jpeg.decode(kept.numpy(), channels)), kept, width, height)


def resized_pixels(
    file: BinaryIO, name: str, size: int, resize: str, channels: int
) -> tuple[torch.Tensor, tuple[int, int]]:
    """A file's pixels uint8 [K, S, S], before any JPEG, and its own (width, height)."""
    bands, own = decode_bands(file, name, channels, at_least=size)
    return torch.cat([to_tensor(RESIZE[resize](band, size)) for band in bands]), own


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB -> uint8 [3, H, W]; a single band -> uint8 [1, H, W]."""
    return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1).contiguous()

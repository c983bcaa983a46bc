"""Reads masks: image files with one class id for each pixel."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ImageFile

from fastmae.errors import InputError
from fastmae.images.codec_memory import bytes_per_pixel
from fastmae.images.decode import UndecodableError, codec_memory, load_image, open_image
from fastmae.images.reading import read_or_refuse

IGNORED = 255
"""Id of pixels that count for nothing. Classes are 0 to 254, so an id is one byte."""
ID_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
"""Pillow's modes of images with one integer for each pixel."""
WAY_OUT = "write the mask again, as a grey or palette PNG (Pillow's mode L or P)"


@dataclass(frozen=True)
class MaskEncoding:
    """How the numbers in a mask file stand for class ids.

    Attributes:
        zero_ignored: whether 0 is ignored and k stands for class k - 1, as in ADE20K.
        ignored: number that is ignored besides 255; 255 for none.
    """

    zero_ignored: bool = False
    ignored: int = IGNORED


def read_mask(path: Path, encoding: MaskEncoding) -> np.ndarray:
    """Class ids of a mask, uint8 [H, W]; 255 is ignored.

    Raises:
        InputError: not an image, damaged, too large, with colours instead of ids, or with ids over 255.
    """
    stored = read_or_refuse(path, _stored, WAY_OUT)
    if stored.dtype.itemsize > 1:
        outside = stored[(stored < 0) | (stored > IGNORED)]
        if outside.size:
            raise InputError(f"{path}: holds the id {int(outside.flat[0])}; ids are 0 to 254, and {IGNORED} is ignored")
    ids = stored.astype(np.uint8)  # a copy: Pillow's array is read-only
    if encoding.ignored != IGNORED:
        ids[ids == encoding.ignored] = IGNORED
    if encoding.zero_ignored:
        ids = np.where(ids == IGNORED, IGNORED, ids - np.uint8(1))  # 0 wraps round to 255
    return ids


def mask_size(path: Path) -> tuple[int, int]:
    """(width, height) of a mask in pixels, from its header.

    Raises:
        InputError: not an image, too large, or with colours instead of ids.
    """
    return read_or_refuse(path, lambda file: _opened(file).size, WAY_OUT)


def _opened(file: BinaryIO) -> ImageFile.ImageFile:
    """A mask whose header is fine."""
    image = open_image(file)
    if image.mode not in ID_MODES:
        raise UndecodableError(f"has colours ({image.mode}) instead of a class id for each pixel")
    return image


def _stored(file: BinaryIO) -> np.ndarray:
    """The numbers in a mask file, [H, W]."""
    image = _opened(file)
    load_image(image, codec_memory(image), 2 * math.prod(image.size) * bytes_per_pixel(image.mode))
    return np.asarray(image)

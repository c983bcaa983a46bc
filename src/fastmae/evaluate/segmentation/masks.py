"""Reads masks: image files with one class id for each pixel."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastmae.errors import InputError, first_line
from fastmae.images.decode import MAX_PIXELS
from fastmae.outside.regular_file import open_regular

IGNORED = 255
"""Id of pixels that count for nothing. Classes are 0 to 254, so an id is one byte."""
ID_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
"""Pillow's modes of images with one integer for each pixel."""


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
    with _opened(path) as image:
        stored = np.asarray(image)
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
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A mask file whose header is fine; any error while it is open becomes an InputError."""
    try:
        with open_regular(path) as file, Image.open(file) as image:
            width, height = image.size
            if image.mode not in ID_MODES:
                raise InputError(
                    f"{path}: has colours ({image.mode}) instead of a class id for each pixel; "
                    "save the ids as a grey or palette PNG (Pillow's mode L or P)"
                )
            if width * height > MAX_PIXELS:
                raise InputError(
                    f"{path}: declares {width} x {height} pixels, more than the {MAX_PIXELS >> 20} Mpx allowed"
                )
            yield image
    except InputError:
        raise
    except Exception as error:  # codecs raise nearly any type on damaged files
        raise InputError(f"{path}: damaged, or not an image ({first_line(error)}); write the mask again") from error

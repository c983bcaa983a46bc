"""Whether the image files that annotations name are there and of the size that they say; from the files' headers alone."""

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from fastmae.errors import InputError, first_line
from fastmae.evaluate.detection.masks import Size
from fastmae.runtime.progress import Progress

THREADS = 16
"""Files opened at a time: on a disk across a network it is the waiting that takes long."""
AT_A_TIME = 4096
"""Files given to them at a time."""
ORIENTATION = 0x0112
ON_THE_SIDE = {5, 6, 7, 8}
"""Values of the EXIF tag by which a picture is shown on its side."""


def check_images(annotations: Path, paths: Sequence[Path], sizes: Sequence[Size], progress: str) -> None:
    """Look at the header of every image.

    Args:
        annotations: the file that names them.
        paths: of the images.
        sizes: what it says of theirs.
        progress: first word of the progress line; empty: none is shown.

    Raises:
        InputError: names the first image that is missing and how many are, or one that is no image, or of another size.
    """
    missing: list[Path] = []
    with Progress(progress, "images", len(paths), quiet=not progress) as shown, ThreadPoolExecutor(THREADS) as threads:
        for first in range(0, len(paths), AT_A_TIME):
            part = paths[first : first + AT_A_TIME]
            for path, told, found in zip(
                part, sizes[first : first + AT_A_TIME], threads.map(_upright_size, part), strict=True
            ):
                if found is None:
                    missing.append(path)
                else:
                    _compare(annotations, path, told, *found)
            shown.advance(len(part))
    if missing:
        share = f"{len(missing)} of the {len(paths)} images are" if len(missing) > 1 else "it is the only one"
        raise InputError(
            f"{missing[0]}: missing, though {annotations} names it ({share}); put it there, or remove it from the annotations"
        )


def _upright_size(path: Path) -> tuple[Size, bool] | None:
    """(width, height) as the picture is shown, and whether it was turned on its side for that; None where there is no file.

    Raises:
        InputError: no image.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            turned = image.getexif().get(ORIENTATION) in ON_THE_SIDE
            return (image.height, image.width) if turned else image.size, turned
    except FileNotFoundError:
        return None
    except Exception as error:  # codecs raise nearly any type on damaged headers
        raise InputError(
            f"{path}: not an image that can be read ({first_line(error)}); replace it, or remove it from the annotations"
        ) from error


def _compare(annotations: Path, path: Path, told: Size, size: Size, turned: bool) -> None:
    if size != told:
        exif = ", as its EXIF orientation turns it; save it upright" if turned else "; annotate the image as it is"
        raise InputError(
            f"{path}: {annotations} says {told[0]} x {told[1]} pixels, the image has {size[0]} x {size[1]}{exif}"
        )

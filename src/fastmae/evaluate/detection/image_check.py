"""Checks that annotated images exist and have the annotated size, from the files' headers alone."""

from collections.abc import Sequence
from pathlib import Path

from fastmae.errors import InputError
from fastmae.evaluate.detection.masks import Size
from fastmae.evaluate.file_checks import map_in_threads, upright_size
from fastmae.runtime.progress import Progress

THREADS = 16
"""Threads that read headers; on a network disk nearly all of that time is waiting."""


def check_images(annotations: Path, paths: Sequence[Path], sizes: Sequence[Size], progress: str) -> None:
    """Check the header of every image.

    Args:
        annotations: the file that names the images.
        paths: of the images.
        sizes: (width, height) of each image, as annotated.
        progress: first word of the progress line; empty for none.

    Raises:
        InputError: names the first image that is not readable or of another size; or the first missing one, with their
            number.
    """
    with Progress(progress, "images", len(paths), quiet=not progress) as bar:
        images = list(zip(paths, sizes, strict=True))
        exists = list(map_in_threads(lambda image: _check_image(annotations, *image), images, THREADS, bar))
    missing = [path for path, there in zip(paths, exists, strict=True) if not there]
    if missing:
        raise InputError(
            f"{missing[0]}: missing, though {annotations} names it ({len(missing)} of {len(paths)} images are missing)"
            "; put it there, or remove it from the annotations"
        )


def _check_image(annotations: Path, path: Path, annotated: Size) -> bool:
    """Whether the file exists.

    Raises:
        InputError: it is not an image, or has another size.
    """
    try:
        size, turned = upright_size(path, "replace it, or remove it from the annotations")
    except FileNotFoundError:
        return False
    if size != annotated:
        hint = ", as its EXIF orientation turns it; save it upright" if turned else "; annotate the image as it is"
        raise InputError(
            f"{path}: {annotations} says {annotated[0]} x {annotated[1]} pixels, "
            f"the image has {size[0]} x {size[1]}{hint}"
        )
    return True

"""Checks of many image files before training starts, shared by `segment` and `detect`."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from PIL import Image

from fastmae.outside.regular_file import open_regular
from fastmae.runtime.progress import Progress

CHUNK = 4096
"""Files handed to the threads at once, so that waiting tasks take little memory."""
ORIENTATION_TAG = 0x0112
SIDEWAYS = {5, 6, 7, 8}
"""EXIF orientations that swap width and height."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def upright_size(path: Path) -> tuple[tuple[int, int], bool]:
    """Size of an image as it is shown, from its header alone.

    Returns:
        (width, height) in pixels, and whether the EXIF orientation swaps them.

    Raises:
        InputError: a pipe, a socket or a device.
        Exception: codecs raise nearly any type on damaged headers.
    """
    with open_regular(path) as file, Image.open(file) as image:
        swapped = image.getexif().get(ORIENTATION_TAG) in SIDEWAYS
        return (image.height, image.width) if swapped else image.size, swapped


def map_in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], threads: int, progress: Progress
) -> Iterator[Result]:
    """Results in the order of the items. The first error ends it; items that are still waiting are then not begun."""
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(items), CHUNK):
            for result in pool.map(function, items[start : start + CHUNK]):
                yield result
                progress.advance(1)

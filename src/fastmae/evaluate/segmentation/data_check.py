"""What the files hold, looked at before training starts: sizes from the headers, ids from the masks' pixels.

Every header is read. Of more than `MANY` masks only so many are decoded, evenly spread, unless nothing but the masks tells how
many classes there are; ids in the others are checked when training or evaluation reads them.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

from fastmae.errors import InputError, first_line
from fastmae.evaluate.segmentation.layout import IGNORED, Pair, Reading, SegmentationData, mask_size, read_mask
from fastmae.images.decode import decode_bands
from fastmae.runtime.device import cores
from fastmae.runtime.progress import Progress

MANY = 5000
"""Masks that are decoded for their ids alone: about 3 ms each at 512 x 683, shared among the cores."""
SIDEWAYS = {5, 6, 7, 8}
"""EXIF orientations that swap width and height."""
Given = TypeVar("Given")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Survey:
    """What was found.

    Attributes:
        names: of the classes, from the data's own file or by their ids.
        short_side: the training images' median shorter side, in pixels.
        pixels: int64 [256], how often each id stands in the decoded training masks.
        decoded: masks whose ids were read.
    """

    names: tuple[str, ...]
    short_side: int
    pixels: np.ndarray
    decoded: int

    @property
    def untrained(self) -> list[str]:
        """Classes that no decoded training mask holds."""
        return [name for number, name in enumerate(self.names) if not self.pixels[number]]


def survey(data: SegmentationData, channels: int, quiet: bool = False) -> Survey:
    """Check every pair's sizes and the masks' ids.

    Args:
        data: from `find_data`.
        channels: that the images will be decoded to.
        quiet: without a progress line.

    Raises:
        InputError: names the first file that can't be used, or says why the masks as a whole can't.
    """
    pairs = [*data.train, *data.val]
    with ThreadPoolExecutor(max(2, cores())) as pool:
        with Progress("check sizes", "images", len(pairs), quiet=quiet) as progress:
            sizes = list(_each(pool, lambda pair: check_sizes(pair, channels), pairs, progress))
        train, val = (_spread(part, len(pairs) if data.names is None else MANY) for part in (data.train, data.val))
        chosen = [*train, *val]
        with Progress("check ids", "masks", len(chosen), quiet=quiet) as progress:
            counts: np.ndarray = np.stack(
                list(_each(pool, lambda pair: count_ids(pair, data.reading), chosen, progress))
            )
    _check_not_empty(data, counts[: len(train)].sum(0), counts[len(train) :].sum(0))
    names = data.names or tuple(str(number) for number in range(int(np.flatnonzero(counts.sum(0)[:IGNORED]).max()) + 1))
    for pair, present in zip(chosen, counts, strict=True):
        check_ids(pair, present, len(names), data)
    return Survey(
        names,
        int(statistics.median(min(size) for size in sizes[: len(data.train)])),
        counts[: len(train)].sum(0),
        len(chosen),
    )


def check_sizes(pair: Pair, channels: int) -> tuple[int, int]:
    """(width, height) that a photo, upright by its EXIF orientation, and its mask share.

    Raises:
        InputError: they differ, or one of the files is no image.
    """
    image, mask = _image_size(pair, channels), mask_size(pair.mask)
    if image != mask:
        turned = "; its EXIF orientation turns the photo, but not its mask" if image == mask[::-1] else ""
        raise InputError(
            f"{pair.mask}: {mask[0]} x {mask[1]} pixels, but its image {pair.image.name} has {image[0]} x {image[1]}{turned}; "
            "a mask holds one id for each pixel of its image"
        )
    return image


def count_ids(pair: Pair, reading: Reading) -> np.ndarray:
    """How many pixels of a mask have each id: int64 [256]."""
    return np.bincount(read_mask(pair.mask, reading).ravel(), minlength=IGNORED + 1)


def check_ids(pair: Pair, present: np.ndarray, classes: int, data: SegmentationData) -> None:
    """Check that a mask holds no id beyond the classes'.

    Args:
        pair: whose mask it is.
        present: [256], nonzero for the ids that stand in it.
        classes: how many there are.
        data: for the message.

    Raises:
        InputError: it holds one; the message has it as it stands in the file.
    """
    outside = np.flatnonzero(present[classes:IGNORED])
    if len(outside):
        first = int(data.reading.zero_ignored)
        ids = f"{first} to {classes - 1 + first}, {0 if first else data.reading.ignored} is ignored"
        raise InputError(
            f"{pair.mask}: holds the id {outside[0] + classes + first}, but {data.named_in} names {classes} classes ({ids})"
        )


def _image_size(pair: Pair, channels: int) -> tuple[int, int]:
    try:
        if pair.image.suffix.lower() == ".npy":
            with pair.image.open("rb") as file:
                return decode_bands(file, pair.image.name, channels)[1]
        with Image.open(pair.image) as image:
            width, height = image.size
            return (height, width) if image.getexif().get(0x0112) in SIDEWAYS else (width, height)
    except Exception as error:  # codecs raise nearly any type on damaged files
        raise InputError(
            f"{pair.image}: not an image, or damaged ({first_line(error)}); remove it from the data"
        ) from error


def _spread(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """At most so many of them, evenly spread."""
    return list(pairs[:: max(1, math.ceil(len(pairs) / most))])


def _each(
    pool: ThreadPoolExecutor, function: Callable[[Given], Found], given: Sequence[Given], progress: Progress
) -> Iterable[Found]:
    """Results in order; at the first failure what has not begun yet is left."""
    tasks = [pool.submit(function, one) for one in given]
    try:
        for task in tasks:
            yield task.result()
            progress.advance(1)
    finally:
        for task in tasks:
            task.cancel()


def _check_not_empty(data: SegmentationData, train: np.ndarray, val: np.ndarray) -> None:
    """Raise where there is nothing to tell apart, or nothing to measure."""
    for split, pixels in (("training", train), ("validation", val)):
        if not pixels[:IGNORED].any():
            ignored = 0 if data.reading.zero_ignored else data.reading.ignored
            raise InputError(
                f"{data.root}: every pixel of the {split} masks is {ignored}, which is ignored; write class ids into them"
            )
    if np.count_nonzero(train[:IGNORED]) == 1:
        only = int(np.flatnonzero(train[:IGNORED])[0]) + int(data.reading.zero_ignored)
        black_and_white = (
            f"; {IGNORED} is ignored: write the object as 1, not as {IGNORED}" if train[IGNORED] and not only else ""
        )
        raise InputError(
            f"{data.root}: the training masks hold the class {only} alone; there is nothing to tell apart{black_and_white}"
        )

"""Checks the photos and masks before training: sizes from the headers, ids from the masks' pixels.

Every header is read. At most `MAX_MASKS_READ` masks of each split are decoded, evenly spread, unless nothing but the
masks tells how many classes there are. Ids in the others are checked when they are loaded.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fastmae.errors import InputError
from fastmae.evaluate.file_checks import map_in_threads, upright_size
from fastmae.evaluate.segmentation.layout import Pair, SegmentationData
from fastmae.evaluate.segmentation.masks import IGNORED, MaskEncoding, mask_size, read_mask
from fastmae.images.decode import decode_bands
from fastmae.images.reading import read_or_refuse
from fastmae.images.value_range import AUTO
from fastmae.runtime.device import cores
from fastmae.runtime.progress import Progress
from fastmae.runtime.wording import counted

MAX_MASKS_READ = 5000
"""Decoding a mask takes about 3 ms at 512 x 683; the cores share them."""
MANY_VALUES = 32
"""In one mask. Photos of ADE20K show 10 of its 150 classes on average."""
RARE, MOSTLY = 1 / 500, 0.75
"""A value is rare in a mask if it has less than this share of its pixels. If most of many values are rare, they are
what smoothed edges leave."""


@dataclass(frozen=True)
class DataSummary:
    """What the check learnt about the data.

    Attributes:
        class_names: one for each class id, from the data's own file or else the ids.
        short_side: median of the training photos' shorter sides, in pixels.
        pixel_counts: int64 [256], training pixels of each id, in the masks that were read.
        masks_read: number of masks whose ids were read.
    """

    class_names: tuple[str, ...]
    short_side: int
    pixel_counts: np.ndarray
    masks_read: int

    @property
    def trained_classes(self) -> list[str]:
        """Names of the classes that have pixels in the training masks that were read."""
        return [name for class_id, name in enumerate(self.class_names) if self.pixel_counts[class_id]]

    @property
    def ignored_share(self) -> float:
        """Share of the pixels of the training masks that were read which are ignored."""
        return float(self.pixel_counts[IGNORED] / self.pixel_counts.sum())

    @property
    def untrained_classes(self) -> list[str]:
        """Names of the classes that have no pixel in the training masks that were read."""
        return [name for class_id, name in enumerate(self.class_names) if not self.pixel_counts[class_id]]


def check_data(data: SegmentationData, channels: int, value_range: str = AUTO, quiet: bool = False) -> DataSummary:
    """Check the sizes of all pairs and the ids in the masks.

    Args:
        data: from `find_data`.
        channels: number of channels that the photos will be decoded to.
        value_range: how their values of more than 8 bits will become 8 bits.
        quiet: whether to show no progress.

    Raises:
        InputError: names the first file that can't be used, or says why the masks as a whole can't.
    """
    pairs = [*data.train, *data.val]
    threads = max(2, cores())
    with Progress("check sizes", "images", len(pairs), quiet=quiet) as progress:
        sizes = list(map_in_threads(lambda pair: check_sizes(pair, channels, value_range), pairs, threads, progress))
    max_read = len(pairs) if data.class_names is None else MAX_MASKS_READ
    train, val = _spread(data.train, max_read), _spread(data.val, max_read)
    checked = [*train, *val]
    with Progress("check ids", "masks", len(checked), quiet=quiet) as progress:
        results = map_in_threads(lambda pair: count_ids(pair, data.encoding), checked, threads, progress)
        counts: np.ndarray = np.stack(list(results))
    train_counts, val_counts = counts[: len(train)].sum(0), counts[len(train) :].sum(0)
    _check_not_smoothed(data, checked, counts)
    _check_not_empty(data, train_counts, val_counts)
    class_names = data.class_names
    if class_names is None:
        largest_id = int(np.flatnonzero(counts.sum(0)[:IGNORED]).max())
        class_names = tuple(str(class_id) for class_id in range(largest_id + 1))
    for pair, pair_counts in zip(checked, counts, strict=True):
        check_ids(pair, pair_counts, len(class_names), data)
    short_side = statistics.median(min(size) for size in sizes[: len(data.train)])
    return DataSummary(class_names, int(short_side), train_counts, len(checked))


def check_sizes(pair: Pair, channels: int, value_range: str = AUTO) -> tuple[int, int]:
    """(width, height) in pixels of a photo, upright by its EXIF orientation, and of its mask.

    Raises:
        InputError: the two differ, or one of the files is not an image.
    """
    image, mask = _image_size(pair, channels, value_range), mask_size(pair.mask)
    if image != mask:
        turned = "; its EXIF orientation turns the photo, but not its mask" if image == mask[::-1] else ""
        raise InputError(
            f"{pair.mask}: {mask[0]} x {mask[1]} pixels, but its image {pair.image.name} has "
            f"{image[0]} x {image[1]}{turned}; a mask holds one id for each pixel of its image"
        )
    return image


def count_ids(pair: Pair, encoding: MaskEncoding) -> np.ndarray:
    """Number of pixels of each id in a mask, int64 [256]."""
    return np.bincount(read_mask(pair.mask, encoding).ravel(), minlength=IGNORED + 1)


def check_ids(pair: Pair, counts: np.ndarray, num_classes: int, data: SegmentationData) -> None:
    """Check that a mask holds no id beyond the last class.

    Args:
        pair: the mask's pair.
        counts: [256], number of the mask's pixels of each id.
        num_classes: number of classes.
        data: tells how ids are stored, for the message.

    Raises:
        InputError: names the id as it is stored in the file.
    """
    outside = np.flatnonzero(counts[num_classes:IGNORED])
    if len(outside):
        first = int(data.encoding.zero_ignored)  # stored id of the first class
        ignored = 0 if first else data.encoding.ignored
        raise InputError(
            f"{pair.mask}: holds the id {outside[0] + num_classes + first}, but {data.names_source} names "
            f"{counted(num_classes, 'class', 'classes')} ({first} to {num_classes - 1 + first}, {ignored} is ignored)"
        )


def _image_size(pair: Pair, channels: int, value_range: str) -> tuple[int, int]:
    way_out = "remove it and its mask from the data"
    if pair.image.suffix.lower() == ".npy":
        decode = partial(decode_bands, name=pair.image.name, channels=channels, value_range=value_range)
        return read_or_refuse(pair.image, lambda file: decode(file)[1], way_out)
    return upright_size(pair.image, way_out)[0]


def _spread(pairs: Sequence[Pair], at_most: int) -> Sequence[Pair]:
    """Every n-th pair, such that there are not more than `at_most`."""
    return pairs[:: max(1, math.ceil(len(pairs) / at_most))]


def _check_not_smoothed(data: SegmentationData, pairs: Sequence[Pair], counts: np.ndarray) -> None:
    """Refuse masks whose values are shades between ids: resized smoothly, or kept as JPEG once.

    Args:
        data: tells how many classes there are.
        pairs: of the masks.
        counts: [masks, 256], pixels of each id.
    """
    values = counts > 0
    is_rare = values & (counts < RARE * counts.sum(axis=1, keepdims=True))
    is_smoothed = (values.sum(axis=1) >= MANY_VALUES) & (is_rare.sum(axis=1) >= MOSTLY * values.sum(axis=1))
    if data.class_names is not None:  # many small objects may be in a mask, but each is of a class
        is_smoothed &= values[:, len(data.class_names) : IGNORED].any(axis=1)
    smoothed = np.flatnonzero(is_smoothed)
    if len(smoothed):
        first = smoothed[0]
        raise InputError(
            f"{pairs[first].mask}: holds {values[first].sum()} values, {is_rare[first].sum()} of them in less than "
            f"{100 * RARE:g} % of its pixels each, as smoothed edges or JPEG leave them ({len(smoothed)} of the "
            f"{len(pairs)} masks read are like this); write each pixel's id as it is, resize masks by nearest "
            "neighbour; or, if these are ids, name all classes in classes.json"
        )


def _check_not_empty(data: SegmentationData, train_counts: np.ndarray, val_counts: np.ndarray) -> None:
    """Refuse masks with nothing to measure, or with one class only.

    Args:
        data: tells how ids are stored, for the message.
        train_counts: [256], training pixels of each id.
        val_counts: [256], validation pixels of each id.
    """
    for split, counts in (("training", train_counts), ("validation", val_counts)):
        if not counts[:IGNORED].any():
            ignored = 0 if data.encoding.zero_ignored else data.encoding.ignored
            raise InputError(
                f"{data.root}: every pixel of the {split} masks is {ignored}, which is ignored; "
                "write class ids into them"
            )
    present = np.flatnonzero(train_counts[:IGNORED])
    if len(present) == 1:
        is_black_and_white = train_counts[IGNORED] and present[0] == 0 and not data.encoding.zero_ignored
        hint = f"; {IGNORED} is ignored: write the object as 1, not as {IGNORED}" if is_black_and_white else ""
        stored_id = present[0] + int(data.encoding.zero_ignored)
        raise InputError(
            f"{data.root}: the training masks hold the class {stored_id} alone; there is nothing to tell apart{hint}"
        )

"""What `--value-range set`, `--precision auto` and `--codec auto` stand for.

They are measured on the images before a store is begun, then recorded. A store that was begun keeps what it records, so
a continued call, other processes, other middle sizes and `--add` take the same. Several processes that begin a store at
once measure the same images with the same seed; the first one's description stays.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from fastmae.config import TokenizeConfig
from fastmae.config.tokenize import AUTO
from fastmae.errors import InputError
from fastmae.images.decode import wide_values
from fastmae.images.entries import key_of
from fastmae.images.image_list import ImageList
from fastmae.images.reading import Skipped, read_or_skip
from fastmae.images.value_range import PERCENTILES, bounds_of, percentiles, sample_of, text_of
from fastmae.offline.codec_choice import HELD_OUT_EVERY, choose_codec
from fastmae.offline.listing import ListedImages
from fastmae.offline.middle_images import LoaderOptions, MiddleImages
from fastmae.offline.options import SET
from fastmae.offline.sample import sample_tokens
from fastmae.runtime.progress import Progress
from fastmae.runtime.wording import counted
from fastmae.teachers import Teacher
from fastmae.teachers.precision import FULL_PRECISION, MIN_COSINE, precision_cosines
from fastmae.tokens.codec import Codec
from fastmae.tokens.format import STORE_FILE, StoreInfo, read_store_info

log = logging.getLogger(__name__)

CHECKED_IMAGES = 16
"""Most images on which precisions are compared."""
RANGE_IMAGES, RANGE_VALUES = 128, 1 << 14
"""Most images that tell the range of a set's values, and about as many values of each."""


def begun_store(*folders: Path) -> StoreInfo | None:
    """The description of the store in the first of the folders that has one; None if none has."""
    return next((read_store_info(folder) for folder in folders if (folder / STORE_FILE).exists()), None)


def settle(
    config: TokenizeConfig, info: StoreInfo, listed: ListedImages, teacher: Teacher, begun: StoreInfo | None
) -> tuple[StoreInfo, Codec | None]:
    """Settle the value range, the teacher's precision and the codec.

    Args:
        config: the command's options.
        info: description of a new store of the images.
        listed: the images.
        teacher: on its device; its precision is set.
        begun: the description that a begun store records, or the store of another middle size.

    Returns:
        The description with value range, precision and codec, and the codec if its choice has learnt it already.

    Raises:
        InputError: none of the images that are tried can be decoded, or has values of more than 8 bits.
    """
    if info.value_range == SET and begun is None:
        info = replace(info, value_range=_range_of_set(info, listed))
    elif info.value_range == SET and begun is not None and bounds_of(begun.value_range):
        info = replace(info, value_range=begun.value_range)
    if config.precision != AUTO:
        teacher.precision = config.precision
    elif begun is not None:
        teacher.precision = begun.teacher.get("precision", FULL_PRECISION)
    else:
        teacher.precision = _fastest_for(_images(info, listed), teacher, config.batch_size)
    info = replace(info, teacher=teacher.describe())
    if config.codec != AUTO:
        return info, None
    if begun is not None:
        return replace(info, codec=begun.codec), None
    images, options = _images(info, listed), LoaderOptions(config.batch_size, config.workers, config.strict)
    num_images = min(config.codec_images, info.parts[0].images)
    total = sum(len(positions) for _, positions in images.evenly_spaced(num_images, options.batch_size))
    with Progress("sample tokens", "images", total=total) as progress:
        sample = sample_tokens(images, teacher, options, num_images, config.seed, progress, HELD_OUT_EVERY)
    with Progress("choose a codec", minor=True) as progress:
        codec, _ = choose_codec(sample, config.seed, progress.now)
    return replace(info, codec=codec.name), codec


def _range_of_set(info: StoreInfo, listed: ListedImages) -> str:
    """The percentiles of images all over the list, each of which has about the same weight.

    Raises:
        InputError: none of them can be decoded, or all are pictures of 8 bits.
    """
    images, samples, skipped = _images(info, listed), [], []
    ranges = images.evenly_spaced(min(RANGE_IMAGES, info.parts[0].images), 1)
    with Progress("measure the values", "images", total=len(ranges)) as progress:
        for part, positions in ranges:
            (entry,) = images.lists[part].slice(positions.start, positions.start + 1)
            read = partial(_values_to_measure, key_of(entry), info.channels)
            values = read_or_skip(images.sources[part], entry, read)
            if isinstance(values, Skipped):
                skipped.append(f"{key_of(entry)}: {values.reason}")
            else:
                samples.append(values)
            progress.advance(1)
    low, high = percentiles(np.concatenate(samples)) if samples else (0.0, 0.0)
    if low < high:
        value_range = text_of(*(float(f"{value:.6g}") for value in (low, high)))
        low_percent, high_percent = PERCENTILES
        measured = counted(len(samples), "image")
        log.info(f"value range {value_range}: percentiles {low_percent} and {high_percent} of {measured}")
        return value_range
    if skipped and len(skipped) == len(ranges):
        raise InputError(f"{images.origin}: none of the {len(ranges)} images tried could be decoded ({skipped[0]})")
    raise InputError(
        f"--value-range set: the {len(ranges)} images of {images.origin} that were tried have no values of more than "
        "8 bits, or one value only; leave it out"
    )


def _values_to_measure(key: str, channels: int, file: BinaryIO) -> np.ndarray:
    """A sample of an image's values; none of a picture of 8 bits."""
    values = wide_values(file, key, channels)
    return np.zeros(0) if values is None else sample_of(values, RANGE_VALUES)


def _images(info: StoreInfo, listed: ListedImages) -> MiddleImages:
    return MiddleImages(info, {0: ImageList(listed.file)}, {0: listed.source})


def first_pixels(images: MiddleImages, batch_size: int) -> torch.Tensor:
    """Pixels of the first images of the first part's list, on which precisions are compared: uint8 [n, K, S, S].

    Args:
        images: the images.
        batch_size: most images that the device takes at once.
    """
    part = min(images.sources)
    return images[part, range(min(CHECKED_IMAGES, batch_size, images.info.parts[part].images))].pixels


def fastest(cosines: Mapping[str, float], device: torch.device) -> str:
    """The fastest precision that keeps a cosine of `MIN_COSINE` to fp32's tokens; fp32 on a CPU.

    Args:
        cosines: by the precision, the fastest first.
        device: the teacher's.
    """
    if device.type == "cpu":
        return FULL_PRECISION
    for name, cosine in cosines.items():
        if cosine >= MIN_COSINE:
            log.info(f"precision {name}: its tokens keep a cosine of {cosine:.5f} to fp32's")
            return name
        log.info(f"precision {name}: its tokens' cosine to fp32's is {cosine:.5f}, below {MIN_COSINE}; not taken")
    return FULL_PRECISION


def _fastest_for(images: MiddleImages, teacher: Teacher, batch_size: int) -> str:
    """The fastest precision for a teacher, measured on the first images unless it is on a CPU."""
    device = teacher.mean.device
    with Progress("compare precisions", minor=True):
        pixels = torch.empty(0) if device.type == "cpu" else first_pixels(images, batch_size).to(device)
        return fastest(precision_cosines(teacher, pixels) if len(pixels) else {}, device)

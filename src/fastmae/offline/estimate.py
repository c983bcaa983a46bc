"""What a store will take, in bytes and in time, measured on a few of its images before it is built."""

import logging
import math
import shutil
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastmae.config import TokenizeConfig
from fastmae.errors import InputError
from fastmae.images.image_list import ImageList
from fastmae.offline.listing import ListedImages
from fastmae.offline.middle_images import LoaderOptions, MiddleImages
from fastmae.offline.options import build_teacher, describe_store
from fastmae.offline.sample import tokens_on_cpu
from fastmae.offline.settle import begun_store, settle
from fastmae.runtime.device import own_device
from fastmae.runtime.progress import Progress, counted_through, duration
from fastmae.runtime.wording import counted
from fastmae.teachers import Teacher
from fastmae.tokens.codec import code_layout, keeps_means, learnt_shapes
from fastmae.tokens.format import StoreInfo

log = logging.getLogger(__name__)

SAMPLE_IMAGES = 64
"""Number of images that `--dry-run` measures. A quarter of them tell how much disk a store needs before it is begun."""
RECORD_BYTES = 200
"""Approximate bytes of an image besides tokens and pixels: its key in list, header and index, and its checksums."""


@dataclass(frozen=True)
class SampleMeasurement:
    """What a sample of the images tells about all of them.

    Attributes:
        pixel_bytes: mean bytes of an image's pixels on disk.
        decoded: fraction of the images that can be decoded.
        images_per_second: speed of decoding and teacher together.
    """

    pixel_bytes: float
    decoded: float
    images_per_second: float


def dry_run(config: TokenizeConfig, sizes: list[int], listed: ListedImages, network: Any) -> dict[str, Any]:
    """Measure how large a store will be and how long it will take. Nothing is written.

    Args:
        config: the command's options.
        sizes: middle sizes, in pixels.
        listed: the images.
        network: the teacher's network and weights file, from `load_network`.

    Returns:
        The command's JSON.

    Raises:
        InputError: no new images, or none of the sample can be decoded.
    """
    num_images = listed.info.images
    if not num_images:
        raise InputError(f"{config.images}: holds nothing that the store does not hold already")
    sample_size = min(SAMPLE_IMAGES, num_images)
    total_bytes = seconds = image_bytes = 0.0
    all_codebooks = 0
    begun: StoreInfo | None = None
    for size in sizes:
        teacher = build_teacher(config, size, *deepcopy(network))
        info = describe_store(config, size, teacher, listed.part)
        options = LoaderOptions(config.batch_size, config.workers, config.strict)
        begun = begun or begun_store(config.store, config.store / str(size))
        few = replace(config, codec_images=min(config.codec_images, sample_size))
        info, _ = settle(few, info, listed, teacher, begun)
        begun = begun or info
        images = MiddleImages(info, {0: ImageList(listed.file)}, {0: listed.source})
        sample = measure_sample(images, teacher, options, sample_size)
        image_bytes += bytes_per_image(info, sample.pixel_bytes)
        total_bytes += bytes_per_image(info, sample.pixel_bytes) * sample.decoded * num_images
        all_codebooks += 0 if config.add else codebook_bytes(info)
        seconds += num_images / sample.images_per_second
    total_bytes += all_codebooks
    free = shutil.disk_usage(nearest_folder(config.store)).free
    codebooks = f" and {all_codebooks / 1e6:.1f} MB of codebooks" if all_codebooks else ""
    log.info(
        f"{counted(num_images, 'image')} x {image_bytes / 1e3:.1f} kB{codebooks} = {total_bytes / 1e9:.3g} GB "
        f"({info.codec} tokens, {config.pixels} pixels), {'MORE THAN' if total_bytes > free else 'of'} the "
        f"{free / 1e9:.3g} GB that are free at {config.store}; about {duration(seconds)} on this "
        f"{own_device(config.device).type} alone, {num_images / seconds:.1f} images/s; measured on {sample_size} of "
        "them; nothing was written"
    )
    return {
        "images": num_images,
        "skipped": 0,
        "grid": sizes[0] // config.patch_size,
        "token_dim": info.token_dim,
        "codec": info.codec,
        "precision": teacher.precision,
        "bytes": round(total_bytes),
        "bytes_per_image": round(image_bytes),
        "images_per_second": round(num_images / seconds, 2),
        "seconds": round(seconds, 1),
        "free": free,
    }


def measure_sample(
    images: MiddleImages, teacher: Teacher, options: LoaderOptions, num_images: int
) -> SampleMeasurement:
    """Run a few batches through decoding and teacher. The first one, in which both warm up, is not timed.

    Raises:
        InputError: none of the images can be decoded.
    """
    ranges = images.evenly_spaced(num_images, min(options.batch_size, max(1, num_images // 4)))
    start, untimed = time.monotonic(), 0
    tried = decoded = pixel_bytes = 0
    batches = images.load(ranges, options.workers)
    for batch in counted_through(batches, f"measure {images.info.middle_size} px", "batches", len(ranges)):
        images.check_strict(batch, options.strict)
        tokens_on_cpu(teacher, batch)
        if not tried and len(ranges) > 1:
            start, untimed = time.monotonic(), len(batch.images)
        tried += len(batch.images)
        decoded += len(batch.pixels)
        pixel_bytes += batch.stored_bytes
    if not decoded:
        raise InputError(f"{images.origin}: none of the {num_images} images tried could be decoded")
    return SampleMeasurement(
        pixel_bytes=pixel_bytes / decoded,
        decoded=decoded / tried,
        images_per_second=(tried - untimed) / (time.monotonic() - start),
    )


def check_disk(folder: Path, images: MiddleImages, num_images: int) -> None:
    """Check that the disk has room for `num_images` more images of a store.

    Raises:
        InputError: too little space. The message says how much is free, how much is needed, and which codec needs less.
    """
    info = images.info
    sample_size = min(SAMPLE_IMAGES // 4, info.parts[min(images.sources)].images)
    with Progress("estimate the disk space", minor=True):
        sample = [images[image_range] for image_range in images.evenly_spaced(sample_size, SAMPLE_IMAGES)]
    pixel_bytes = sum(batch.stored_bytes for batch in sample)
    mean_pixel_bytes = pixel_bytes / max(1, sum(len(batch.pixels) for batch in sample))

    def needed_with(codec: str) -> float:
        with_codec = replace(info, codec=codec)
        return num_images * bytes_per_image(with_codec, mean_pixel_bytes) + codebook_bytes(with_codec)

    needed, free = needed_with(info.codec), shutil.disk_usage(nearest_folder(folder)).free
    if needed > free:
        codec = f"pq{min(48, info.token_dim)}"
        smaller = f"; --codec {codec} takes {needed_with(codec) / 1e9:.3g} GB" if needed_with(codec) <= free else ""
        takes = f"{counted(num_images, 'image')} take about {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
        raise InputError(f"{folder}: {takes}{smaller}; free some, or take another disk")


def bytes_per_image(info: StoreInfo, pixel_bytes: float) -> float:
    """Bytes of an image on disk: tokens (and those of the mirrored image), pixels, and what names and checks them."""
    codes_per_token, dtype = code_layout(info.codec, info.token_dim)
    mean_bytes = 2 * info.token_dim if keeps_means(info.codec) else 0
    grid_bytes = info.grid**2 * codes_per_token * np.dtype(dtype).itemsize + mean_bytes
    return grid_bytes * (2 if info.flips == "stored" else 1) + pixel_bytes + RECORD_BYTES


def codebook_bytes(info: StoreInfo) -> int:
    """Bytes on disk of what the codec has learnt and of the copy."""
    return 2 * sum(4 * math.prod(shape) for shape in learnt_shapes(info.codec, info.token_dim).values())


def nearest_folder(path: Path) -> Path:
    """The path itself, or the first folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())

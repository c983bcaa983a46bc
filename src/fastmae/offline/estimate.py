"""What a store will take, in bytes and in time, before it is made: measured on a few of its images."""

import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastmae.errors import InputError
from fastmae.images.reading import Skipped
from fastmae.offline.fill import LoaderOptions, MiddleImages, run_teacher
from fastmae.runtime.workers import worker_count
from fastmae.teachers import Teacher
from fastmae.tokens.codec import code_layout, keeps_means, learnt_shapes
from fastmae.tokens.format import StoreInfo

SAMPLED = 64
"""Images from which `--dry-run` measures, and a quarter of which tell the need of disk before the start."""
RECORD_BYTES = 200
"""Of an image, about, beside its tokens and pixels: its key in list, header and index, its checksums."""


@dataclass(frozen=True)
class Measured:
    """What a sample of the images says of them all: bytes of an image's pixels on disk, share that can be decoded, images a second."""

    pixel_bytes: float
    decoded: float
    images_per_second: float


def measure_sample(images: MiddleImages, teacher: Teacher, loading: LoaderOptions, count: int) -> Measured:
    """Run a few batches through decoding and teacher; the first one, in which both warm up, is not timed."""
    batches = images.evenly_spaced(count, min(loading.batch_size, max(1, count // 4)))
    begun, untimed, parts = time.monotonic(), 0, []
    for batch in images.load(batches, min(worker_count(loading.workers), len(batches))):
        parts.append(run_teacher(teacher, batch, images, loading).to_host())
        if len(parts) == 1 < len(batches):
            begun, untimed = time.monotonic(), len(batch)
    pixels = [p.numel() for part in parts for p in part.pixels]
    if not pixels:
        raise InputError(f"{images.origin}: none of the {count} images tried could be decoded")
    seen = sum(len(part.records) for part in parts)
    return Measured(sum(pixels) / len(pixels), len(pixels) / seen, (seen - untimed) / (time.monotonic() - begun))


def check_disk(folder: Path, images: MiddleImages, left: int) -> None:
    """Enough free disk for what is left to make.

    Raises:
        InputError: not enough; says how much there is, how much it takes, and what takes less.
    """
    info = images.info
    batches = images.evenly_spaced(min(SAMPLED // 4, info.parts[min(images.sources)].images), SAMPLED)
    kept = [image for batch in batches for _, image in images[batch] if not isinstance(image, Skipped)]
    pixels = sum((image.pixels if image.jpeg is None else image.jpeg).numel() for image in kept) / max(1, len(kept))
    needed, free = (
        left * bytes_per_image(info, pixels) + codebook_bytes(info),
        shutil.disk_usage(nearest_folder(folder)).free,
    )
    if needed > free:
        small = replace(info, codec=f"pq{min(48, info.token_dim)}")
        with_small = left * bytes_per_image(small, pixels) + codebook_bytes(small)
        smaller = f"; --codec {small.codec} takes {with_small / 1e9:.3g} GB" if with_small <= free else ""
        takes = f"{left} images take about {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
        raise InputError(f"{folder}: {takes}{smaller}; free some, or take another disk")


def bytes_per_image(info: StoreInfo, pixel_bytes: float) -> float:
    """On disk: tokens (twice with the mirrored images' own), pixels, and what names and checks them."""
    numbers, dtype = code_layout(info.codec, info.token_dim)
    mean = 2 * info.token_dim if keeps_means(info.codec) else 0
    tokens = (info.grid**2 * numbers * np.dtype(dtype).itemsize + mean) * (2 if info.flips == "stored" else 1)
    return tokens + pixel_bytes + RECORD_BYTES


def codebook_bytes(info: StoreInfo) -> int:
    """On disk: what the codec has learnt, and its copy."""
    return 2 * sum(4 * math.prod(shape) for shape in learnt_shapes(info.codec, info.token_dim).values())


def nearest_folder(path: Path) -> Path:
    """The path itself, or the first folder above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())

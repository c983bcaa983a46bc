"""`fastmae features`: embed any set of images, one vector per image, and with --dense one per patch.

Images are decoded in worker processes, embedded here, and written as they come.
"""

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset

from fastmae import __version__
from fastmae.config import FeaturesConfig
from fastmae.errors import InputError
from fastmae.evaluate.feature_files import DTYPES, FeatureFile, open_feature_file
from fastmae.images.entries import key_of
from fastmae.images.image_list import ImageList
from fastmae.images.middle import resized_pixels
from fastmae.images.reading import Skipped, read_or_skip
from fastmae.images.sources import Source
from fastmae.images.views import PixelScale
from fastmae.offline.estimate import nearest_folder
from fastmae.offline.listing import ListedImages, listed_images
from fastmae.probes.embed import check_pool, pooled, tokens_of
from fastmae.runs.encoder import OpenedEncoder, open_encoder
from fastmae.runtime.arithmetic import computes_as_asked
from fastmae.runtime.batch_memory import check_batch
from fastmae.runtime.device import memory_hint
from fastmae.runtime.durable import remove_parts, write_whole
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import launch
from fastmae.runtime.ownership import owned_place
from fastmae.runtime.progress import Progress
from fastmae.runtime.wording import counted
from fastmae.runtime.workers import as_is, batches

log = logging.getLogger(__name__)
MAX_NAMED_SKIPS = 1000
"""Skipped images that the JSON names."""
MAX_SHOWN_SKIPS = 20
"""Skipped images that are shown."""


@dataclass
class ImageBatch:
    """A batch of decoded images, and those that could not be decoded.

    Attributes:
        keys: keys of the decoded images.
        pixels: uint8 [len(keys), K, S, S].
        skipped: (key, reason) of the others.
    """

    keys: list[str]
    pixels: torch.Tensor
    skipped: list[tuple[str, str]]

    def pin_memory(self) -> "ImageBatch":
        """The batch in pinned memory; called by the loader for a GPU."""
        return ImageBatch(self.keys, self.pixels.pin_memory(), self.skipped)


@dataclass
class Tally:
    """Counts of the images so far.

    Attributes:
        images: number of images embedded.
        skipped: number of images skipped.
        named: path and reason of the first skipped ones.
    """

    images: int = 0
    skipped: int = 0
    named: list[dict[str, str]] = field(default_factory=list)

    def add(self, batch: ImageBatch) -> None:
        """Count a batch."""
        self.images += len(batch.keys)
        self.skipped += len(batch.skipped)
        room = MAX_NAMED_SKIPS - len(self.named)
        self.named += [{"path": key, "reason": reason} for key, reason in batch.skipped[:room]]


class ListedPictures(Dataset[ImageBatch]):
    """Ranges of an image list -> batches of whole pictures, resized as the middle image is.

    Args:
        images: the list.
        source: where the images are.
        opened: the encoder they are for.
    """

    def __init__(self, images: ImageList, source: Source, opened: OpenedEncoder):
        self.images, self.source = images, source
        self.size, self.resize, self.channels = opened.image_size, opened.resize, opened.channels
        self.value_range = opened.value_range

    def __getitem__(self, indices: range) -> ImageBatch:
        keys, skipped = [], []
        pixels = [torch.zeros(0, self.channels, self.size, self.size, dtype=torch.uint8)]
        for entry in self.images.slice(indices.start, indices.stop):
            key = key_of(entry)
            image = read_or_skip(self.source, entry, partial(self._pixels, key))
            if isinstance(image, Skipped):
                skipped.append((key, image.reason))
            else:
                keys.append(key)
                pixels.append(image[None])
        return ImageBatch(keys, torch.cat(pixels), skipped)

    def _pixels(self, key: str, file: BinaryIO) -> torch.Tensor:
        return resized_pixels(file, key, self.size, self.resize, self.channels, self.value_range)[0]

    def batches(self, batch_size: int, workers: int, device: torch.device) -> Iterator[ImageBatch]:
        """All images, in the order of the list."""
        count = len(self.images)
        ranges = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        return batches(self, device, workers, sampler=ranges, collate=as_is)


EmbedBatch = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
"""uint8 [B, K, S, S] on the CPU -> float32 [B, D], and with --dense [B, g, g, D], on the device."""


@computes_as_asked
def features(config: FeaturesConfig) -> dict[str, Any]:
    """Embed the images and write the file; the command's JSON.

    Raises:
        InputError: options, images or a file that can't be used; no image that can be decoded; or another process that
            writes the file.
    """
    config.check_out()
    with owned_place(config.out, "features"):
        return _features(config)


def _features(config: FeaturesConfig) -> dict[str, Any]:
    fabric = launch(config.device, config.precision, 1, config.seed)
    opened = open_encoder(config.run, config.image_size, weights=config.weights, pretrained=config.pretrained)
    embed = batch_embedder(opened, config.pool, config.block, config.dense, fabric)
    dim, grid = _sizes(opened, embed)
    with listed_images(config.images, False, config.out) as listed:
        check_batch(min(config.batch_size, listed.info.images), opened.channels, opened.image_size)
        _make_room(config, dim, grid, listed.info.images)
        pictures, start = ListedPictures(ImageList(listed.file), listed.source, opened), time.monotonic()
        image_batches = pictures.batches(config.batch_size, config.workers, fabric.device)
        file = _NewFile(dim, grid, listed.info.images, _metadata(config, opened, listed))
        tally = _write_file(config, file, image_batches, embed)
    rate = round(tally.images / (time.monotonic() - start), 2)
    file_bytes = config.out.stat().st_size
    _log_skipped(tally)
    dense = f" and {grid} x {grid} more" if grid else ""
    log.info(
        f"{config.out}: {counted(tally.images, 'image')}, {tally.skipped} skipped; a vector of {dim}{dense} for each, "
        f"{file_bytes / 1e6:.1f} MB"
    )
    return {
        "images": tally.images,
        "dim": dim,
        "grid": grid,
        "skipped": tally.skipped,
        "skipped_images": tally.named,
        "images_per_second": rate,
        "file": str(config.out),
        "bytes": file_bytes,
    }


def batch_embedder(opened: OpenedEncoder, pool: str, block: int | None, dense: bool, fabric: Fabric) -> EmbedBatch:
    """A function that embeds a batch under the run's precision.

    Raises:
        InputError: the encoder has no class token, or no such block.
    """
    network, device = opened.network.to(fabric.device), fabric.device
    check_pool(network, pool)
    tokens, pixel_scale = tokens_of(network, block), PixelScale(opened.mean, opened.std)

    @torch.inference_mode()
    def embed(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        with fabric.autocast():
            patches, prefix = tokens(pixel_scale(pixels.to(device, non_blocking=True)))
        patches, prefix = patches.float(), prefix.float()
        side = math.isqrt(patches.shape[1])
        return pooled(network, patches, prefix, pool), patches.unflatten(1, (side, side)) if dense else None

    return embed


def _sizes(opened: OpenedEncoder, embed: EmbedBatch) -> tuple[int, int | None]:
    """D, and g with --dense, which depend on the block: from a blank image."""
    vector, dense = embed(torch.zeros(1, opened.channels, opened.image_size, opened.image_size, dtype=torch.uint8))
    return vector.shape[1], None if dense is None else dense.shape[1]


@dataclass(frozen=True)
class _NewFile:
    """What is known about the file beforehand.

    Attributes:
        dim: D.
        grid: patches (positions of the map) along a side of the grid that is kept; None: only the vectors are.
        images: listed images.
        metadata: of the file.
    """

    dim: int
    grid: int | None
    images: int
    metadata: dict[str, Any]


def _write_file(config: FeaturesConfig, new: _NewFile, image_batches: Iterable[ImageBatch], embed: EmbedBatch) -> Tally:
    """Write the file, whole or not at all."""
    tally = Tally()

    def write(temporary: Path) -> None:
        file = open_feature_file(
            temporary, config.out.suffix, new.images, new.dim, new.grid, config.dtype, new.metadata
        )
        with Progress("features", "images", total=new.images) as progress:
            _embed_all(file, image_batches, embed, tally, progress, config)

    with memory_hint(f"give --batch-size {max(1, config.batch_size // 2)}"):
        write_whole(config.out, write)
    return tally


def _embed_all(
    file: FeatureFile,
    image_batches: Iterable[ImageBatch],
    embed: EmbedBatch,
    tally: Tally,
    progress: Progress,
    config: FeaturesConfig,
) -> None:
    """Embed and write all batches. A batch is written after the next one was started, so that a GPU never waits."""
    pending: tuple[list[str], tuple[torch.Tensor, torch.Tensor | None]] | None = None
    for batch in image_batches:
        if batch.skipped and config.strict:
            key, reason = batch.skipped[0]
            raise InputError(f"{config.images}: {key}: {reason}; repair or remove it, or leave out --strict to skip it")
        started = (batch.keys, embed(batch.pixels)) if batch.keys else None
        _write_rows(file, pending)
        pending = started
        tally.add(batch)
        progress.advance(len(batch.keys) + len(batch.skipped))
    _write_rows(file, pending)
    file.close()
    if not tally.images:
        first = f"{tally.named[0]['path']}: {tally.named[0]['reason']}"
        raise InputError(f"{config.images}: none of its {tally.skipped} images can be decoded ({first})")


def _write_rows(file: FeatureFile, rows: tuple[list[str], tuple[torch.Tensor, torch.Tensor | None]] | None) -> None:
    if rows is not None:
        keys, (vectors, dense) = rows
        file.add(keys, vectors.cpu().numpy(), None if dense is None else dense.cpu().numpy())


def _make_room(config: FeaturesConfig, dim: int, grid: int | None, images: int) -> None:
    """Make the folder of the file, and check the free disk space.

    Raises:
        InputError: not enough space.
    """
    vectors = images * (1 + (grid or 0) ** 2)
    needed = vectors * dim * np.dtype(DTYPES[config.dtype]).itemsize
    free = shutil.disk_usage(nearest_folder(config.out.absolute().parent)).free
    if needed > free:
        smaller = "; --dtype fp16 takes half" if config.dtype == "fp32" else ""
        raise InputError(
            f"{config.out}: the features of {counted(images, 'image')} take {needed / 1e9:.3g} GB, and "
            f"{free / 1e9:.3g} GB are free{smaller}; free some space, or use another disk"
        )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(config.out.parent)


def _metadata(config: FeaturesConfig, opened: OpenedEncoder, listed: ListedImages) -> dict[str, Any]:
    """How the features were made: the encoder, the pooling, the images."""
    return {
        "version": __version__,
        "encoder": {name: value for name, value in opened.describe().items() if name != "prefix"},
        "pool": config.pool,
        "block": config.block,
        "images_sha256": listed.info.sha256,
        "listed": listed.info.images,
    }


def _log_skipped(tally: Tally) -> None:
    for skipped in tally.named[:MAX_SHOWN_SKIPS]:
        log.info(f"skipped {skipped['path']}: {skipped['reason']}")
    if tally.skipped > MAX_SHOWN_SKIPS:
        log.info(f"... and {tally.skipped - MAX_SHOWN_SKIPS} more")

"""`fastmae features`: any set of images -> a vector each, and with --dense a grid of them. Decoded in workers, written as they come."""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastmae import __version__
from fastmae.config import FeaturesConfig
from fastmae.errors import InputError
from fastmae.evaluate.feature_files import DTYPES, EmbeddingFile, check_file, open_embeddings
from fastmae.images.entries import key_of
from fastmae.images.image_list import ImageList
from fastmae.images.middle import resized_pixels
from fastmae.images.reading import Skipped, read_or_skip
from fastmae.images.sources import Source
from fastmae.images.views import normalise
from fastmae.offline.estimate import nearest_folder
from fastmae.offline.listing import ListedImages, listed_images
from fastmae.probes.embed import check_pool, pooled, tokens_of
from fastmae.runs.encoder import OpenedEncoder, open_encoder
from fastmae.runtime.device import memory_hint
from fastmae.runtime.durable import remove_parts, write_whole
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import launch
from fastmae.runtime.progress import Progress
from fastmae.runtime.workers import guarded, heed_only_the_parent, worker_count

NAMED_SKIPS = 1000
"""Of the images that were skipped, how many are named in the JSON, at most."""
SHOWN_SKIPS = 20


@dataclass
class Loaded:
    """A batch: the keys of the images that could be decoded, their pixels uint8 [b, K, S, S], and the others with the reasons."""

    keys: list[str]
    pixels: torch.Tensor
    skipped: list[tuple[str, str]]

    def pin_memory(self) -> "Loaded":
        """Called by the loader, for faster copies to a GPU."""
        return Loaded(self.keys, self.pixels.pin_memory(), self.skipped)


@dataclass
class Outcome:
    """What came of the images: how many were embedded, how many skipped, and the names and reasons of the first of these."""

    images: int = 0
    skipped: int = 0
    named: list[dict[str, str]] = field(default_factory=list)


class ListedPictures(Dataset[Loaded]):
    """Places of a list -> whole pictures resized as the middle image is.

    Args:
        images: the list.
        source: where they are.
        opened: the encoder they are for.
    """

    def __init__(self, images: ImageList, source: Source, opened: OpenedEncoder):
        self.images, self.source = images, source
        self.size, self.resize, self.channels = opened.image_size, opened.resize, opened.channels

    def __getitem__(self, places: range) -> Loaded:
        keys, pixels, skipped = [], [torch.zeros(0, self.channels, self.size, self.size, dtype=torch.uint8)], []
        for entry in self.images.slice(places.start, places.stop):
            key = key_of(entry)
            found = read_or_skip(self.source, entry, partial(self._pixels, key))
            if isinstance(found, Skipped):
                skipped.append((key, found.reason))
            else:
                keys.append(key)
                pixels.append(found[None])
        return Loaded(keys, torch.cat(pixels), skipped)

    def _pixels(self, key: str, file: BinaryIO) -> torch.Tensor:
        return resized_pixels(file, key, self.size, self.resize, self.channels)[0]

    def batches(self, batch_size: int, workers: int, pinned: bool) -> Iterator[Loaded]:
        """All, in the list's order."""
        count = len(self.images)
        places = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        loader: DataLoader[Any] = DataLoader(
            self, batch_size=None, sampler=places, num_workers=min(workers, len(places)), collate_fn=_as_it_is, pin_memory=pinned,
            worker_init_fn=heed_only_the_parent,
        )  # fmt: skip
        return guarded(loader)


def features(config: FeaturesConfig) -> dict[str, Any]:
    """Embed and write; the command's JSON.

    Raises:
        InputError: options, images or a place that can't be used; not one image that can be decoded.
    """
    check_file(config.out, config.dense)
    if config.batch_size < 1:
        raise InputError(f"--batch-size {config.batch_size}: give 1 or more")
    workers = worker_count(config.workers)
    fabric = launch(config.device, config.precision, 1, config.seed)
    opened = open_encoder(config.run, config.image_size, weights=config.weights, pretrained=config.pretrained)
    embed = embedder(opened, config.pool, config.block, config.dense, fabric)
    with listed_images(config.images, False, config.out) as listed:
        _make_room(config, opened, listed.info.images)
        pictures, begun = ListedPictures(ImageList(listed.file), listed.source, opened), time.monotonic()
        batches = pictures.batches(config.batch_size, workers, fabric.device.type == "cuda")
        outcome = _write_all(config, opened, listed, batches, embed)
    rate = round(outcome.images / (time.monotonic() - begun), 2)
    dim, grid = int(opened.network.embed_dim), _grid(config, opened)
    size = config.out.stat().st_size
    _name_skipped(outcome)
    dense = f" and {grid} x {grid} more" if grid else ""
    print(
        f"{config.out}: {outcome.images} images, {outcome.skipped} skipped; a vector of {dim}{dense} each, {size / 1e6:.1f} MB"
    )
    return {
        "images": outcome.images, "dim": dim, "grid": grid, "skipped": outcome.skipped, "skipped_images": outcome.named,
        "images_per_second": rate, "file": str(config.out), "bytes": size,
    }  # fmt: skip


def _grid(config: FeaturesConfig, opened: OpenedEncoder) -> int | None:
    """Patches along the side of the grid that is kept, or None."""
    return opened.image_size // opened.patch_size if config.dense else None


def _write_all(
    config: FeaturesConfig, opened: OpenedEncoder, listed: ListedImages, batches: Iterable[Loaded], embed: "Embedder"
) -> Outcome:
    """The file, whole or not at all."""
    outcome, dim, count = Outcome(), int(opened.network.embed_dim), listed.info.images

    def write(aside: Path) -> None:
        made = _made(config, opened, listed)
        file = open_embeddings(aside, config.out.suffix, count, dim, _grid(config, opened), config.dtype, made)
        with Progress("features", "images", total=count) as progress:
            _fill(file, batches, embed, outcome, progress, config)

    with memory_hint(f"give --batch-size {max(1, config.batch_size // 2)}"):
        write_whole(config.out, write)
    return outcome


Embedder = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
"""uint8 [B, K, S, S] on the CPU -> float32 [B, D], and [B, g, g, D] where asked for, on the device."""


def embedder(opened: OpenedEncoder, pool: str, block: int | None, dense: bool, fabric: Fabric) -> Embedder:
    """How a batch is embedded.

    Raises:
        InputError: no class token to take, or no such block.
    """
    network, device = opened.network.to(fabric.device), fabric.device
    check_pool(network, pool)
    tokens, grid = tokens_of(network, block), opened.image_size // opened.patch_size

    @torch.inference_mode()
    def embed(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        with fabric.autocast():
            patches, prefix = tokens(normalise(pixels.to(device, non_blocking=True), opened.mean, opened.std))
        patches, prefix = patches.float(), prefix.float()
        return pooled(network, patches, prefix, pool), patches.unflatten(1, (grid, grid)) if dense else None

    return embed


def _fill(
    file: EmbeddingFile,
    batches: Iterable[Loaded],
    embed: Embedder,
    outcome: Outcome,
    progress: Progress,
    config: FeaturesConfig,
) -> None:
    """Embed and write all batches, one behind: a GPU has its next batch before the last one's features are waited for."""
    before: tuple[list[str], tuple[torch.Tensor, torch.Tensor | None]] | None = None
    for batch in batches:
        if batch.skipped and config.strict:
            key, reason = batch.skipped[0]
            raise InputError(f"{config.images}: {key}: {reason}; repair or remove it, or leave out --strict to skip it")
        started = (batch.keys, embed(batch.pixels)) if batch.keys else None
        _write(file, before)
        before = started
        outcome.images += len(batch.keys)
        outcome.skipped += len(batch.skipped)
        outcome.named += [
            {"path": key, "reason": reason} for key, reason in batch.skipped[: NAMED_SKIPS - len(outcome.named)]
        ]
        progress.advance(len(batch.keys) + len(batch.skipped))
    _write(file, before)
    file.close()
    if not outcome.images:
        reason = f"{outcome.named[0]['path']}: {outcome.named[0]['reason']}"
        raise InputError(f"{config.images}: none of its {outcome.skipped} images can be decoded ({reason})")


def _write(file: EmbeddingFile, done: tuple[list[str], tuple[torch.Tensor, torch.Tensor | None]] | None) -> None:
    if done is not None:
        keys, (vectors, dense) = done
        file.add(keys, vectors.cpu().numpy(), None if dense is None else dense.cpu().numpy())


def _make_room(config: FeaturesConfig, opened: OpenedEncoder, images: int) -> None:
    """The folder of the file, with enough free disk.

    Raises:
        InputError: not enough.
    """
    vectors = images * (1 + (_grid(config, opened) or 0) ** 2)
    needed = vectors * int(opened.network.embed_dim) * np.dtype(DTYPES[config.dtype]).itemsize
    free = shutil.disk_usage(nearest_folder(config.out.absolute().parent)).free
    if needed > free:
        smaller = "; --dtype fp16 takes half" if config.dtype == "fp32" else ""
        takes = f"the features of {images} images take {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
        raise InputError(f"{config.out}: {takes}{smaller}; free some, or take another disk")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(config.out.parent)


def _made(config: FeaturesConfig, opened: OpenedEncoder, listed: ListedImages) -> dict[str, Any]:
    """For the file's metadata: which encoder, read how, of which images."""
    return {
        "version": __version__,
        "encoder": {name: value for name, value in opened.describe().items() if name != "prefix"},
        "pool": config.pool,
        "block": config.block,
        "images_sha256": listed.info.sha256,
        "listed": listed.info.images,
    }


def _name_skipped(outcome: Outcome) -> None:
    for skipped in outcome.named[:SHOWN_SKIPS]:
        print(f"skipped {skipped['path']}: {skipped['reason']}")
    if outcome.skipped > SHOWN_SKIPS:
        print(f"... and {outcome.skipped - SHOWN_SKIPS} more")


def _as_it_is(batch: Any) -> Any:
    return batch

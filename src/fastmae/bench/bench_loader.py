"""`fastmae bench loader`: what one core brings to the device, views of a store with their tokens, beside MAE's loading from files.

MAE's side is what its authors' training script asks of torchvision: Pillow decodes the whole file, RandomResizedCrop
(scale 0.2 to 1, bicubic) to the view's size, flip, ToTensor, Normalize, the images stacked into a batch. Ours is
`StoreViews.__getitems__`, which the loader workers call. One process, one thread, no workers; the files are in the system's cache,
so seconds are the CPU's: those of the clock on an idle machine, and the same on a busy one.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision import transforms

from fastmae.bench.sample import (
    Remembered,
    begin_store,
    check_fit,
    check_patches,
    codec_names,
    evenly,
    finished_store,
    listed,
    store_info,
)
from fastmae.bench.table import Table, check_out, machine
from fastmae.bench.timing import Rate, check_positive, figure, interleave, one_core
from fastmae.config import BenchLoaderConfig
from fastmae.errors import InputError
from fastmae.images import jpeg
from fastmae.images.decode import UndecodableError, decode_image
from fastmae.images.sources import Source, open_source
from fastmae.images.views import IMAGENET_MEAN, IMAGENET_STD, Draw, ViewDraws, normalise
from fastmae.offline.fill import LoaderOptions
from fastmae.runtime.device import own_device
from fastmae.student.encoder import visible_patches
from fastmae.teachers import Teacher, load_teacher
from fastmae.tokens import TokenStore
from fastmae.tokens.format import shard_path
from fastmae.tokens.loader import LAYOUTS, StoreViews
from fastmae.tokens.shard import MappedShard

MAE = "MAE: decode, RandomResizedCrop, flip, normalise"
MASK_RATIO = 0.75
PIXELS = ("jpeg", "raw")
JPEG_QUALITY = 90
CODEC_IMAGES = 512
SHARES = ("decode", "copy", "tokens", "draws", "rest")

NOTES = (
    "One process, one thread, no loader workers; every round runs each row once over all images in random order, and the median over "
    "the rounds is given with the slowest and the fastest. Seconds are this process's CPU time, so that other work on the machine does not "
    "count. The files, ours and theirs, are in the system's cache: no disk is measured.",
    "MAE's rows end in a stacked float32 batch. fastmae's end in a stacked uint8 batch with the tokens as the codec has them, places, "
    "flips and masks drawn, as the product hands it to the device, which normalises and decodes; 'normalised here' adds the former on "
    "this core.",
    "'first pass': the same over a store that was just opened, with each shard mapped and the checksum of every record verified.",
    "Shares are of the median time: decode (of the whole file; of the view's part of the stored JPEG), copy (of the pixels into the "
    "batch, mirrored where they are), tokens (their look-up, into the batch), draws, each timed by itself in the same rounds; the rest "
    "is what remains.",
)


@dataclass(frozen=True)
class MaeImages:
    """A source's images as MAE's authors load them."""

    source: Source
    entries: list[bytes]
    transform: Callable[[Image.Image], torch.Tensor]

    @classmethod
    def of(cls, source: Source, entries: list[bytes], size: int) -> "MaeImages":
        """Views of `size` pixels a side."""
        steps = [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
        return cls(source, entries, transforms.Compose(steps))

    def decode(self, index: int) -> Image.Image:
        """The whole picture."""
        with self.source.open(self.entries[index]) as file, Image.open(file) as image:
            return image.convert("RGB")

    def decode_all(self, indices: Sequence[int]) -> None:
        """What of `batch` is decoding."""
        for index in indices:
            self.decode(index)

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        """float32 [B, 3, H, W]."""
        return default_collate([self.transform(self.decode(index)) for index in indices])


@dataclass(frozen=True)
class Batches:
    """A random order of the images for each round, in batches."""

    images: int
    size: int
    seed: int

    def of(self, number: int) -> list[list[int]]:
        """Those of a round."""
        order = np.random.default_rng((self.seed, number)).permutation(self.images).tolist()
        return [order[start : start + self.size] for start in range(0, self.images, self.size)]

    def timed(self, number: int, work: Callable[[list[int]], object]) -> float:
        """Seconds of CPU for a work on each batch of a round."""
        batches = self.of(number)
        begun = time.process_time()
        for batch in batches:
            work(batch)
        return time.process_time() - begun


@dataclass(frozen=True)
class StoreWorks:
    """The works of one store that are timed: the whole, and its parts by themselves. Each takes a round's number, gives its seconds."""

    store: TokenStore
    draws: ViewDraws
    batches: Batches

    def works(self) -> dict[str, Callable[[int], float]]:
        """By name."""
        parts = {"decode": self._decode, "pixels": self._pixels, "tokens": self._tokens, "draws": self._draws}
        return {"views": self._views, "normalised": self._normalised, "first": self._first_pass, **parts}

    def _views(self, number: int) -> float:
        views = StoreViews([[self.store]], self.draws)
        return self.batches.timed(number, lambda batch: views.__getitems__(_visits(number, batch)))

    def _normalised(self, number: int) -> float:
        views = StoreViews([[self.store]], self.draws)
        return self.batches.timed(number, lambda batch: normalise(views.__getitems__(_visits(number, batch)).pixels))

    def _first_pass(self, number: int) -> float:
        return StoreWorks(TokenStore(self.store.folder), self.draws, self.batches)._views(number)

    def _drawn(self, number: int) -> list[Draw]:
        return [self.draws.draw(number, index, [self.store.grid]) for index in range(len(self.store))]

    def _draws(self, number: int) -> float:
        def draw(batch: list[int]) -> None:
            for index in batch:
                self.draws.draw(number, index, [self.store.grid])

        return self.batches.timed(number, draw)

    def _decode(self, number: int) -> float:
        info, drawn, size = self.store.info, self._drawn(number), self.draws.size
        if info.pixels == "raw":
            return 0.0
        shards = [
            MappedShard(shard_path(self.store.folder, n), *entry) for n, entry in enumerate(self.store.manifest.shards)
        ]
        jpegs = [shard.jpeg(row) for shard in shards for row in range(len(shard.record_checksums))]

        def decode(batch: list[int]) -> None:
            for index in batch:
                top, left = (info.patch_size * offset for offset in (drawn[index].row, drawn[index].col))
                jpeg.decode_part(jpegs[index], top, left, info.patch_size * size, info.middle_size, info.channels)

        return self.batches.timed(number, decode)

    def _pixels(self, number: int) -> float:
        store, drawn, size = self.store, self._drawn(number), self.draws.size
        side = store.info.patch_size * size

        def read(batch: list[int]) -> None:
            shape = (len(batch), store.info.channels, side, side)
            pixels = torch.empty(shape, dtype=torch.uint8, memory_format=LAYOUTS[store.info.pixels]).numpy()
            for place, index in enumerate(batch):
                store.read_pixels(index, drawn[index].row, drawn[index].col, size, drawn[index].flipped, pixels[place])

        return self.batches.timed(number, read)

    def _tokens(self, number: int) -> float:
        store, drawn, size = self.store, self._drawn(number), self.draws.size
        dtype = torch.from_numpy(np.empty(0, store.code_dtype)).dtype

        def look_up(batch: list[int]) -> None:
            tokens = torch.empty(len(batch), size, size, store.code_dim, dtype=dtype).numpy()
            means = np.empty((len(batch), store.mean_dim), np.float16)
            for place, index in enumerate(batch):
                store.read_codes(
                    index, drawn[index].row, drawn[index].col, size, drawn[index].flipped, tokens[place], means[place]
                )

        return self.batches.timed(number, look_up)


def _visits(number: int, batch: list[int]) -> list[tuple[int, int]]:
    return [(number, index) for index in batch]


def bench_loader(config: BenchLoaderConfig) -> dict[str, Any]:
    """Measure, print the table; the command's JSON."""
    check_positive(sample=config.sample, rounds=config.rounds, batch_size=config.batch_size)
    check_patches(config.patch_size, image_size=config.image_size, middle_size=config.middle_size)
    if config.image_size > config.middle_size:
        raise InputError(
            f"--image-size {config.image_size}: larger than --middle-size {config.middle_size}, out of which views are cut"
        )
    codecs = codec_names(config.codecs)
    check_out(config.out)
    source = open_source(config.images)
    with tempfile.TemporaryDirectory(prefix="fastmae-") as aside, torch.random.fork_rng(devices=[]):
        entries = _readable(source, evenly(listed(source, Path(aside)), config.sample))
        grid = config.middle_size // config.patch_size
        teacher = load_teacher(config.teacher, config.middle_size, grid, config.teacher_weights, config.teacher_block)
        check_fit(codecs, teacher)
        stores = _build_all(config, Path(aside), source, entries, teacher.to(own_device(config.device)), codecs)
        torch.manual_seed(config.seed)
        with one_core():
            seconds = _measure(config, source, entries, stores)
    rows = _rows(seconds, len(entries), list(stores))
    settings = machine() | {
        "images": f"{len(entries)} of {config.images}",
        "sizes": f"views of {config.image_size} px out of {config.middle_size}, patches of {config.patch_size}",
        "batches": f"{config.batch_size} views",
        "tokens": f"{config.teacher}, {teacher.token_dim} channels",
        "pixels": f"JPEG quality {JPEG_QUALITY}, or raw",
        "rounds": str(config.rounds),
    }
    Table("Loading on one core", settings, [_shown(row) for row in rows], NOTES).publish(config.out)
    return {"rows": rows, "images": len(entries), "settings": settings}


def _readable(source: Source, entries: list[bytes]) -> list[bytes]:
    """Those that both sides can decode."""
    mae = MaeImages(source, entries, lambda image: torch.empty(0))
    good = []
    for index, entry in enumerate(entries):
        try:
            with source.open(entry) as file:
                decode_image(file)
            mae.decode(index)
        except (UndecodableError, OSError, ValueError):
            continue
        good.append(entry)
    if not good:
        raise InputError(
            f"{source.path}: none of the {len(entries)} images tried could be decoded by both sides; give photos"
        )
    return good


def _build_all(
    config: BenchLoaderConfig, aside: Path, source: Source, entries: list[bytes], teacher: Teacher, codecs: list[str]
) -> dict[str, TokenStore]:
    """A store for each way to keep pixels and tokens."""
    stores = {}
    for pixels in PIXELS:
        remembered = Remembered(teacher)
        for codec in codecs:
            folder = aside / f"{pixels}-{codec}.tokens"
            part = begin_store(folder, source, entries)
            info = store_info(teacher, [part], config.middle_size, config.patch_size, codec, pixels, JPEG_QUALITY)
            loading = LoaderOptions(32, config.workers)
            stores[f"{pixels} pixels, {codec} tokens"] = finished_store(
                folder, info, source, remembered, loading, CODEC_IMAGES, config.seed
            )
    return stores


def _measure(
    config: BenchLoaderConfig, source: Source, entries: list[bytes], stores: dict[str, TokenStore]
) -> dict[tuple[str, str], list[float]]:
    """Seconds a round of each (store or MAE, work)."""
    size = config.image_size // config.patch_size
    draws = ViewDraws(size, True, "random", visible_patches(size**2, MASK_RATIO), config.seed)
    batches = Batches(len(entries), config.batch_size, config.seed)
    mae = MaeImages.of(source, entries, config.image_size)
    works: dict[tuple[str, str], Callable[[int], float]] = {
        (MAE, "views"): lambda number: batches.timed(number, mae.batch),
        (MAE, "decode"): lambda number: batches.timed(number, mae.decode_all),
    }
    for name, store in stores.items():
        works |= {(name, part): work for part, work in StoreWorks(store, draws, batches).works().items()}
    return interleave(works, config.rounds)


def _rows(seconds: dict[tuple[str, str], list[float]], images: int, stores: list[str]) -> list[dict[str, Any]]:
    rows = [_row(seconds, images, MAE, MAE, "views")]
    for name in stores:
        rows.append(_row(seconds, images, f"fastmae: {name}", name, "views"))
        rows.append(_row(seconds, images, f"fastmae: {name}, normalised here", name, "normalised"))
    return rows


def _row(seconds: dict[tuple[str, str], list[float]], images: int, method: str, name: str, work: str) -> dict[str, Any]:
    whole = median(seconds[name, work])
    parts = {
        part: median(seconds[name, part]) / whole
        for part in ("decode", "pixels", "tokens", "draws")
        if (name, part) in seconds
    }
    if "pixels" in parts:
        parts["copy"] = parts.pop("pixels") - parts["decode"]
    shares = parts | {"rest": 1 - sum(parts.values())}
    first = seconds.get((name, "first")) if work == "views" else None
    return {
        "method": method,
        **Rate.of(images, seconds[name, work]).to_json("images_per_second"),
        "milliseconds_per_image": round(1000 * whole / images, 4),
        "times_mae": round(median(seconds[MAE, "views"]) / whole, 2),
        "first_pass_images_per_second": None if first is None else round(Rate.of(images, first).median, 2),
        **{f"share_{part}": round(shares[part], 3) if part in shares else None for part in SHARES},
    }


def _shown(row: dict[str, Any]) -> dict[str, str]:
    share = {part: row[f"share_{part}"] for part in SHARES}
    return {
        "method": row["method"],
        "images/s": figure(row["images_per_second"]),
        "min-max": f"{figure(row['images_per_second_min'])}-{figure(row['images_per_second_max'])}",
        "ms an image": f"{row['milliseconds_per_image']:.3f}",
        "x MAE": f"{row['times_mae']:.1f}",
        "first pass images/s": "-"
        if row["first_pass_images_per_second"] is None
        else figure(row["first_pass_images_per_second"]),
        **{part: "-" if value is None else f"{100 * value:.0f} %" for part, value in share.items()},
    }

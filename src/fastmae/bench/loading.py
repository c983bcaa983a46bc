"""The contenders of `bench loader`: image files loaded as MAE's authors do, and views of a store as `pretrain` does."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision import transforms

from fastmae.bench.delivery import Delivery
from fastmae.bench.timing import Turn, seconds_of
from fastmae.images import jpeg
from fastmae.images.decode import open_image
from fastmae.images.sources import Source
from fastmae.images.views import IMAGENET_MEAN, IMAGENET_STD, Draw, ViewDraws, normalise
from fastmae.tokens import TokenStore
from fastmae.tokens.format import shard_path
from fastmae.tokens.loader import StoreViews, ViewBatch
from fastmae.tokens.shard import MappedShard


@dataclass(frozen=True)
class MaeImages:
    """Image files, loaded by the transforms of MAE's training script.

    Attributes:
        source: the files.
        entries: the images' entries in the source.
        transform: from the decoded image to float32 [3, H, W].
    """

    source: Source
    entries: list[bytes]
    transform: Callable[[Image.Image], torch.Tensor]

    @classmethod
    def of(cls, source: Source, entries: list[bytes], size: int) -> "MaeImages":
        """Images loaded as views of `size` pixels a side."""
        bicubic = transforms.InterpolationMode.BICUBIC
        steps = [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
        return cls(source, entries, transforms.Compose(steps))

    def decode(self, index: int) -> Image.Image:
        """Decode one whole image."""
        with self.source.open(self.entries[index]) as file, open_image(file) as image:
            return image.convert("RGB")

    def decode_batch(self, indices: Sequence[int]) -> None:
        """The decoding in `batch`, by itself."""
        for index in indices:
            self.decode(index)

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        """Load a batch of views, float32 [B, 3, H, W]."""
        return default_collate([self.transform(self.decode(index)) for index in indices])


@dataclass(frozen=True)
class Batches:
    """All images in batches, in another random order in each round.

    Attributes:
        images: number of images.
        size: images per batch.
        seed: seed of the orders.
    """

    images: int
    size: int
    seed: int

    def of_round(self, number: int) -> list[list[int]]:
        """The image indices of each batch of a round."""
        order = np.random.default_rng((self.seed, number)).permutation(self.images).tolist()
        return [order[start : start + self.size] for start in range(0, self.images, self.size)]

    def full_batches_of_round(self, number: int) -> list[list[int]]:
        """As `of_round`; the last batch is filled up with the first images of the round."""
        *full, last = self.of_round(number)
        order = [index for batch in (*full, last) for index in batch]
        return [*full, np.resize([*last, *order], self.size).tolist()]

    def seconds(self, number: int, work: Callable[[list[int]], object]) -> float:
        """CPU seconds of a piece of work over all batches of a round."""
        batches = self.of_round(number)

        def run() -> None:
            for batch in batches:
                work(batch)

        return seconds_of(run, clock=time.process_time)


@dataclass(frozen=True)
class StoreTurns:
    """The timed work of one store: the loading of whole batches, and each part of it by itself.

    Attributes:
        store: the token store.
        draws: draws the views.
        batches: the order of the images.
    """

    store: TokenStore
    draws: ViewDraws
    batches: Batches

    def turns(self) -> dict[str, Turn]:
        """The turns by name.

        'views' is the loading of batches; 'normalised' adds their normalisation; 'first' is 'views' from a store that
        was just opened. 'decode', 'pixels' (which includes 'decode'), 'tokens' and 'draws' are parts of 'views'. All
        write into the same batch again and again, as a loader worker does.
        """
        return {
            "views": self._views,
            "normalised": self._normalised,
            "first": self._first_pass,
            "decode": self._decode,
            "pixels": self._pixels,
            "tokens": self._tokens,
            "draws": self._draws,
        }

    def delivery(self, rounds: int) -> Delivery:
        """The loading of the same images in that many rounds, by a worker."""
        numbers = range(rounds)
        visits = [[_visits(n, batch) for batch in self.batches.full_batches_of_round(n)] for n in numbers]
        return Delivery(StoreViews([[self.store]], self.draws), visits)

    @cached_property
    def _batch(self) -> ViewBatch:
        views, size = StoreViews([[self.store]], self.draws), self.batches.size
        return views.batch_in(torch.zeros(views.batch_bytes(size), dtype=torch.uint8), size)

    def _views(self, number: int) -> float:
        views, out = StoreViews([[self.store]], self.draws), self._batch
        return self.batches.seconds(number, lambda batch: views.fill(out, 0, _visits(number, batch)))

    def _normalised(self, number: int) -> float:
        views, out = StoreViews([[self.store]], self.draws), self._batch

        def load(batch: list[int]) -> None:
            views.fill(out, 0, _visits(number, batch))
            normalise(out.pixels[: len(batch)])

        return self.batches.seconds(number, load)

    def _first_pass(self, number: int) -> float:
        views, out = StoreViews([[TokenStore(self.store.folder)]], self.draws), self._batch
        return self.batches.seconds(number, lambda batch: views.fill(out, 0, _visits(number, batch)))

    def _decode(self, number: int) -> float:
        info, views, size = self.store.info, self._drawn_views(number), self.draws.size
        if info.pixels == "raw":
            return 0.0
        shards = [
            MappedShard(shard_path(self.store.folder, shard), info, shard, entry)
            for shard, entry in enumerate(self.store.manifest.shards)
        ]
        jpegs = [shard.jpeg(row) for shard in shards for row in range(len(shard.record_checksums))]
        side = info.patch_size * size
        out = np.empty((side, side, info.channels), np.uint8)

        def decode(batch: list[int]) -> None:
            for index in batch:
                top, left = info.patch_size * views[index].row, info.patch_size * views[index].col
                jpeg.decode_part(jpegs[index], top, left, info.middle_size, out)

        return self.batches.seconds(number, decode)

    def _pixels(self, number: int) -> float:
        store, views, size, pixels = self.store, self._drawn_views(number), self.draws.size, self._batch.pixels.numpy()

        def read_pixels(batch: list[int]) -> None:
            for row, index in enumerate(batch):
                view = views[index]
                store.read_pixels(index, view.row, view.col, size, view.flipped, pixels[row])

        return self.batches.seconds(number, read_pixels)

    def _tokens(self, number: int) -> float:
        store, views, size = self.store, self._drawn_views(number), self.draws.size
        codes, means = self._batch.tokens[0].unflatten(1, (size, size)).numpy(), self._batch.means[0].numpy()

        def read_codes(batch: list[int]) -> None:
            for row, index in enumerate(batch):
                view = views[index]
                store.read_codes(index, view.row, view.col, size, view.flipped, codes[row], means[row])

        return self.batches.seconds(number, read_codes)

    def _draws(self, number: int) -> float:
        def draw(batch: list[int]) -> None:
            for index in batch:
                self.draws.draw(number, index, [self.store.grid])

        return self.batches.seconds(number, draw)

    def _drawn_views(self, number: int) -> list[Draw]:
        """The view of each image in a round, drawn before the clock starts."""
        return [self.draws.draw(number, index, [self.store.grid]) for index in range(len(self.store))]


def _visits(number: int, batch: list[int]) -> list[tuple[int, int]]:
    """What `StoreViews` takes: (epoch, index), with the round as the epoch."""
    return [(number, index) for index in batch]

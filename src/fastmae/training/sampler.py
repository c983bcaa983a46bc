"""Which images make up which step: a function of (seed, step) alone, so any number of processes and any resume agree.

An epoch's order is a full shuffle, or one within a window of shards, for stores that are read from afar or from a slow disk:
then only a window's shards are needed at a time, and which come next is known.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

Visit = tuple[int, int]
"""(epoch, index): one visit to one image."""
EPOCHS_KEPT = 2
"""Orders held at a time: a batch may span two epochs."""
LOOK_AHEAD = 4096
"""Visits that `shards_ahead` looks through at a time."""


class ShuffleOrder:
    """The order of the images in each epoch: every image once, the same in any process.

    With a window, an epoch shuffles the shards, cuts them into groups of `window`, and shuffles all images of a group among
    themselves. Holds 4 bytes an image for each of the last `EPOCHS_KEPT` epochs.

    Args:
        shard_sizes: images of each shard; images are numbered shard by shard.
        seed: of the shuffles.
        window: shards a group; 0, or as many as there are, for the full shuffle.
    """

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, seed: int, window: int = 0):
        assert window >= 0
        self.seed = seed
        self._ends = np.cumsum(shard_sizes, dtype=np.int64)
        assert self.images < 2**31
        self._window = window if 0 < window < len(self._ends) else 0
        self._used = int(np.count_nonzero(shard_sizes))
        self._kept: dict[int, np.ndarray] = {}

    @property
    def images(self) -> int:
        """In an epoch."""
        return int(self._ends[-1])

    def epoch(self, epoch: int) -> np.ndarray:
        """The images of an epoch in the order of their visits: int32 [images]."""
        if epoch not in self._kept:
            while len(self._kept) >= EPOCHS_KEPT:
                del self._kept[next(iter(self._kept))]
            rng = np.random.default_rng((self.seed, epoch))
            self._kept[epoch] = (
                self._shuffle_within_windows(rng) if self._window else rng.permutation(self.images).astype(np.int32)
            )
        return self._kept[epoch]

    def _shuffle_within_windows(self, rng: np.random.Generator) -> np.ndarray:
        shards = rng.permutation(len(self._ends))
        sizes = np.diff(self._ends, prepend=0)[shards]
        ends = np.cumsum(sizes)
        order = np.arange(self.images, dtype=np.int32)
        order += np.repeat(
            (self._ends[shards] - ends).astype(np.int32), sizes
        )  # the shards in their new order, each still in a row
        for group in np.split(order, ends[self._window - 1 : -1 : self._window]):
            rng.shuffle(group)  # a part of `order`, in its place
        return order

    def shards_ahead(self, epoch: int, offset: int, count: int, visits: int | None = None) -> list[int]:
        """The next shards that are needed from a visit on, across the epoch's end, in the order of their first need.

        Args:
            epoch: of the visit.
            offset: of the visit within the epoch, 0 to images.
            count: shards to name; fewer where the store has fewer.
            visits: look no further than this many visits (to the run's end, say).
        """
        ahead: dict[int, None] = {}
        left = 2 * self.images if visits is None else visits  # within which every shard comes up
        while len(ahead) < min(count, self._used) and left > 0:
            images = self.epoch(epoch)[offset : offset + min(left, LOOK_AHEAD)]
            shards = np.searchsorted(self._ends, images, side="right")
            first = np.sort(np.unique(shards, return_index=True)[1])
            ahead.update(dict.fromkeys(shards[first].tolist()))
            left, offset = left - len(images), offset + len(images)
            if offset >= self.images:
                epoch, offset = epoch + 1, 0
        return list(ahead)[:count]


class StepSampler(Sampler[list[Visit]]):
    """Batches of one process, from a given step to the last.

    The epochs' orders are laid end to end and cut into global batches, so every image is visited once an epoch, none is
    dropped, and a batch may be larger than the data. A process takes its equal part of each global batch.

    Args:
        images: in the data.
        batch_size: views a step, over all processes; must divide by `world_size`.
        steps: in the whole run.
        seed: of the shuffles.
        start_step: first step to give (steps done before it are skipped without touching the data).
        rank: of this process.
        world_size: processes.
        parts: batches that a process's part of a step comes in (gradient accumulation); must divide that part.
        order: of the images in each epoch, by the same seed; the full shuffle by default.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        steps: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
        order: ShuffleOrder | None = None,
    ):
        assert batch_size % (world_size * parts) == 0
        self.order = ShuffleOrder([images], seed) if order is None else order
        assert (self.order.images, self.order.seed) == (images, seed)
        self.images, self.batch_size, self.steps = images, batch_size, steps
        self.start_step, self.rank, self.parts = start_step, rank, parts
        self.part_size = batch_size // (world_size * parts)

    def __len__(self) -> int:
        return (self.steps - self.start_step) * self.parts

    def __iter__(self) -> Iterator[list[Visit]]:
        for step in range(self.start_step, self.steps):
            for part in range(self.parts):
                first = step * self.batch_size + (self.rank * self.parts + part) * self.part_size
                yield [self._visit(place) for place in range(first, first + self.part_size)]

    def shards_ahead(self, step: int, count: int) -> list[int]:
        """The next shards that are needed from a step on, in the order of their first need; none after the last step."""
        epoch, offset = divmod(step * self.batch_size, self.images)
        return self.order.shards_ahead(epoch, offset, count, (self.steps - step) * self.batch_size)

    def _visit(self, place: int) -> Visit:
        epoch, offset = divmod(place, self.images)
        return epoch, int(self.order.epoch(epoch)[offset])

"""Which images make up which step. It follows from (seed, step) alone, so any number of processes and any resume agree.

An epoch's order is a full shuffle, or a shuffle within windows of shards for stores on a remote or a slow disk: then
only the shards of one window are needed at a time, and the next ones are known in advance.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

Visit = tuple[int, int]
"""(epoch, index): one visit to one image."""
EPOCHS_KEPT = 2
"""Orders kept in memory: a batch may span two epochs."""
LOOK_AHEAD = 4096
"""Visits that `shards_ahead` examines at a time."""


class ShuffleOrder:
    """The order of the images in each epoch: every image once, the same in every process.

    With a window, an epoch shuffles the shards, cuts them into groups of `window` shards, and shuffles the images of
    each group among themselves. Memory: 4 bytes per image for each of the last `EPOCHS_KEPT` epochs.

    Args:
        shard_sizes: number of images in each shard; images are numbered shard by shard.
        seed: seed of the shuffles.
        window: shards per group; 0, or at least the number of shards, for the full shuffle.
    """

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, seed: int, window: int = 0):
        assert window >= 0
        self.seed = seed
        self._ends = np.cumsum(shard_sizes, dtype=np.int64)
        assert self.images < 2**31
        self._window = window if 0 < window < len(self._ends) else 0
        self._nonempty_shards = int(np.count_nonzero(shard_sizes))
        self._orders: dict[int, np.ndarray] = {}

    @property
    def images(self) -> int:
        """Images in an epoch."""
        return int(self._ends[-1])

    def epoch(self, epoch: int) -> np.ndarray:
        """The images of an epoch in the order of their visits: int32 [images]."""
        if epoch not in self._orders:
            while len(self._orders) >= EPOCHS_KEPT:
                del self._orders[next(iter(self._orders))]
            rng = np.random.default_rng((self.seed, epoch))
            self._orders[epoch] = self._shuffle_within_windows(rng) if self._window else self._shuffle_all(rng)
        return self._orders[epoch]

    def _shuffle_all(self, rng: np.random.Generator) -> np.ndarray:
        order = np.arange(self.images, dtype=np.int32)
        rng.shuffle(order)  # the order of `rng.permutation(images)`, with a third of its memory
        return order

    def _shuffle_within_windows(self, rng: np.random.Generator) -> np.ndarray:
        # Shuffle the shards; number their images in that order; then shuffle each group of shards in place.
        shards = rng.permutation(len(self._ends))
        sizes = np.diff(self._ends, prepend=0)[shards]
        ends = np.cumsum(sizes)
        order = np.arange(self.images, dtype=np.int32)
        order += np.repeat((self._ends[shards] - ends).astype(np.int32), sizes)
        for group in np.split(order, ends[self._window - 1 : -1 : self._window]):
            rng.shuffle(group)  # a view of `order`
        return order

    def shards_ahead(self, epoch: int, offset: int, count: int, visits: int | None = None) -> list[int]:
        """The next shards that are needed from a visit on, in the order of their first use, across the end of the
        epoch.

        Args:
            epoch: the visit's epoch.
            offset: the visit's place within the epoch, 0 to images.
            count: shards to name; fewer if the store has fewer.
            visits: how many visits to look ahead at most (up to the end of the run, say).
        """
        ahead: dict[int, None] = {}
        left = 2 * self.images if visits is None else visits  # within two epochs, every shard comes up
        while len(ahead) < min(count, self._nonempty_shards) and left > 0:
            images = self.epoch(epoch)[offset : offset + min(left, LOOK_AHEAD)]
            shards = np.searchsorted(self._ends, images, side="right")
            first_uses = np.sort(np.unique(shards, return_index=True)[1])
            ahead.update(dict.fromkeys(shards[first_uses].tolist()))
            left, offset = left - len(images), offset + len(images)
            if offset >= self.images:
                epoch, offset = epoch + 1, 0
        return list(ahead)[:count]


class StepSampler(Sampler[list[Visit]]):
    """The batches of one process, from a given step to the last one.

    The orders of the epochs are laid end to end and cut into global batches. So every image is visited once per epoch,
    none is dropped, and a batch may be larger than the data. Each process takes an equal share of each global batch.

    Args:
        images: number of images.
        batch_size: views per step over all processes; a multiple of `world_size`.
        steps: steps in the whole run.
        seed: seed of the shuffles.
        start_step: the first step; earlier ones are skipped without touching the data.
        rank: number of this process.
        world_size: number of processes.
        grad_accum_steps: batches into which a process's share of a step is cut; divides that share.
        order: order of the images in each epoch, with the same seed; default: the full shuffle.
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
        grad_accum_steps: int = 1,
        order: ShuffleOrder | None = None,
    ):
        assert batch_size % (world_size * grad_accum_steps) == 0
        self.order = ShuffleOrder([images], seed) if order is None else order
        assert (self.order.images, self.order.seed) == (images, seed)
        self.images, self.batch_size, self.steps = images, batch_size, steps
        self.start_step, self.rank, self.grad_accum_steps = start_step, rank, grad_accum_steps
        self.micro_batch_size = batch_size // (world_size * grad_accum_steps)

    def __len__(self) -> int:
        return (self.steps - self.start_step) * self.grad_accum_steps

    def __iter__(self) -> Iterator[list[Visit]]:
        for step in range(self.start_step, self.steps):
            for number in range(self.grad_accum_steps):
                first = step * self.batch_size + (self.rank * self.grad_accum_steps + number) * self.micro_batch_size
                yield [self._visit(position) for position in range(first, first + self.micro_batch_size)]

    def shards_ahead(self, step: int, count: int) -> list[int]:
        """The next shards that are needed from a step on, in the order of their first use; none after the last step."""
        epoch, offset = divmod(step * self.batch_size, self.images)
        return self.order.shards_ahead(epoch, offset, count, (self.steps - step) * self.batch_size)

    def _visit(self, position: int) -> Visit:
        epoch, offset = divmod(position, self.images)
        return epoch, int(self.order.epoch(epoch)[offset])

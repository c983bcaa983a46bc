"""Which images make up which step: a function of (seed, step) alone, so any number of processes and any resume agree."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

Visit = tuple[int, int]
"""(epoch, index): one visit to one image."""


class StepSampler(Sampler[list[Visit]]):
    """Batches of one process, from a given step to the last.

    The epochs' shuffles are laid end to end and cut into global batches, so every image is visited once an epoch, none is
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
    ):
        assert batch_size % (world_size * parts) == 0
        self.images, self.batch_size, self.steps, self.seed = images, batch_size, steps, seed
        self.start_step, self.rank, self.parts = start_step, rank, parts
        self.part_size = batch_size // (world_size * parts)

    def __len__(self) -> int:
        return (self.steps - self.start_step) * self.parts

    def __iter__(self) -> Iterator[list[Visit]]:
        for step in range(self.start_step, self.steps):
            for part in range(self.parts):
                first = step * self.batch_size + (self.rank * self.parts + part) * self.part_size
                yield [self._visit(place) for place in range(first, first + self.part_size)]

    def _visit(self, place: int) -> Visit:
        epoch, offset = divmod(place, self.images)
        return epoch, int(_shuffle(self.images, self.seed, epoch)[offset])


@lru_cache(maxsize=2)
def _shuffle(images: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(images)

"""Views delivered to the training process: CPU seconds of a loader worker, and of the process that it works for."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from fastmae.bench.timing import Turn
from fastmae.runtime.ring import ring_batches
from fastmae.tokens.loader import StoreViews, ViewBatch

STAMP_BYTES = 64
"""Memory behind each batch for the worker's clock: a cache line."""


class StampedViews:
    """Views whose batches also hold the CPU seconds of the process that wrote them.

    Args:
        views: the data set.
    """

    def __init__(self, views: StoreViews):
        self.views = views

    def batch_bytes(self, size: int) -> int:
        """As `StoreViews.batch_bytes`, with the stamp."""
        return self.views.batch_bytes(size) + STAMP_BYTES

    def batch_in(self, memory: torch.Tensor, size: int) -> tuple[ViewBatch, torch.Tensor]:
        """A batch in given memory, and its stamp: float64 [1]."""
        return self.views.batch_in(memory[:-STAMP_BYTES], size), memory[-STAMP_BYTES:][:8].view(torch.float64)

    def fill(self, batch: tuple[ViewBatch, torch.Tensor], first: int, visits: Sequence[Any]) -> None:
        """Write views into the batch, and then all CPU seconds that this process has used since it began."""
        views, stamp = batch
        self.views.fill(views, first, visits)
        stamp[0] = time.process_time()


class Delivery:
    """The loading of batches by one worker, as in `pretrain`. The worker lives through all rounds.

    A round's seconds of the worker are those between the ends of the last batches of two rounds. So they hold what it
    takes to send a message about each batch. Its start falls into round 0, which does not count.

    Args:
        views: the data set.
        rounds: for each round its batches of visits, all of one size.
    """

    def __init__(self, views: StoreViews, rounds: Sequence[Sequence[Sequence[tuple[int, int]]]]):
        visits = [batch for batches in rounds for batch in batches]
        self._batches_per_round, self._batch_size = len(rounds[0]), len(visits[0])
        self._batches = ring_batches(StampedViews(views), torch.device("cpu"), 1, visits, self._batch_size)
        self._stamp = 0.0
        self._seconds: dict[int, tuple[float, float]] = {}

    @property
    def views_per_round(self) -> int:
        """Views that are delivered in a round."""
        return self._batches_per_round * self._batch_size

    def turns(self) -> dict[str, Turn]:
        """'delivered': the CPU seconds of the worker; 'received': those of this process, for the same views."""
        return {"delivered": lambda number: self._round(number)[0], "received": lambda number: self._round(number)[1]}

    def _round(self, number: int) -> tuple[float, float]:
        """Seconds of the worker and of this process in a round. Rounds are first asked for in order."""
        if number not in self._seconds:
            start = time.process_time()
            for _ in range(self._batches_per_round):
                _, stamp = next(self._batches)
            received, before, self._stamp = time.process_time() - start, self._stamp, stamp.item()
            self._seconds[number] = self._stamp - before, received
        return self._seconds[number]

"""Batches that worker processes write straight into shared memory: a ring of slots, made once, each for one batch.

A batch is cut into parts. A DataLoader hands the parts to its workers in order; a worker writes its part into the rows
of the slot that are the part's, and sends nothing back but the slot's number. So no batch is copied or sent, and memory
is bounded by a few batches, however many workers there are.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch.utils.data import Dataset

from fastmae.errors import OneProcessError
from fastmae.runtime.device import local_processes, pinned_in_place
from fastmae.runtime.memory import available_for_sharing, shared_memory
from fastmae.runtime.workers import as_is, batches, worker_count, workers_that_fit

Batch = TypeVar("Batch")

SMALLEST_PART, LARGEST_PART = 64, 512
"""Rows of a part: enough that the message about it costs little, and few enough that workers share a large batch."""
BATCHES_AHEAD = 2
"""Batches that the workers have been told to fill beyond those that were delivered, at least."""


@runtime_checkable
class FillsBatches(Protocol[Batch]):
    """A data set that writes samples into a batch whose memory it is given."""

    def batch_bytes(self, size: int) -> int:
        """Bytes of a batch of `size` samples."""

    def batch_in(self, memory: torch.Tensor, size: int) -> Batch:
        """A batch of `size` samples whose tensors lie in `memory`, uint8 [batch_bytes(size)]."""

    def fill(self, batch: Batch, first: int, visits: Sequence[Any]) -> None:
        """Write the samples of some visits into the rows of the batch from row `first` on."""


@dataclass(frozen=True)
class RingPlan:
    """How batches are cut into parts, and the number of slots.

    Why no slot is rewritten while it is in use: the DataLoader first hands out `parts_ahead` parts, and then one more
    for each part that it returns. With A for `parts_ahead` and P for `parts`: when it returns the last part of batch k,
    the latest part that it has handed out has the number (k + 1) P + A - 1, from 0, and belongs to batch
    k + ceil(A / P). From the oldest batch in use, k + 1 - held, to that one there are held + ceil(A / P) batches. So
    this many slots do. `_Parts` asserts it for every part.

    Attributes:
        part_size: samples in a part; the last part of a batch may have fewer.
        parts: parts of a batch.
        prefetch: parts that each worker is given ahead.
        parts_ahead: parts that are handed out before the first one is returned.
        slots: number of slots; never more than batches.
        held: number of latest batches that stay as they are; see `ring_batches`.
    """

    part_size: int
    parts: int
    prefetch: int
    parts_ahead: int
    slots: int
    held: int

    @classmethod
    def of(cls, batch_size: int, batch_count: int, workers: int, held: int) -> "RingPlan":
        """The plan for a number of batches of one size, and of worker processes (0: this process loads)."""
        share = math.ceil(batch_size / max(1, workers))
        part_size = min(batch_size, max(SMALLEST_PART, min(LARGEST_PART, share))) if workers else batch_size
        parts = math.ceil(batch_size / part_size)
        prefetch = max(2, math.ceil(BATCHES_AHEAD * parts / workers)) if workers else 0
        parts_ahead = min(workers, parts * batch_count) * prefetch
        slots = min(max(1, batch_count), math.ceil(parts_ahead / parts) + held)
        return cls(math.ceil(batch_size / parts), parts, prefetch, parts_ahead, slots, held)


class _Part(NamedTuple):
    """Rows of a slot, from `first` on, and what is to be written there."""

    slot: int
    first: int
    visits: Sequence[Any]


class _Parts:
    """The parts of all batches in order. Iterated by the DataLoader in this process, part by part as it hands them out.

    Attributes:
        wanted: number of the batch that is being waited for.
    """

    def __init__(self, visits: Iterable[Sequence[Any]], batch_count: int, plan: RingPlan):
        self.visits, self.batch_count, self.plan = visits, batch_count, plan
        self.wanted = 0

    def __len__(self) -> int:
        return self.batch_count * self.plan.parts

    def __iter__(self) -> Iterator[_Part]:
        plan = self.plan
        for number, visits in enumerate(self.visits):
            for first in range(0, len(visits), plan.part_size):
                # The slot's last batch, if it had one, is not in use any more.
                assert number - plan.slots <= max(-1, self.wanted - plan.held)
                yield _Part(number % plan.slots, first, visits[first : first + plan.part_size])


class _SlotWriter(Dataset[int]):
    """What a worker process runs: `writer[part]` writes a part into its slot and returns the slot's number."""

    def __init__(self, dataset: FillsBatches[Any], slots: torch.Tensor, batch_size: int):
        self.dataset, self.slots, self.batch_size = dataset, slots, batch_size

    def __getitem__(self, part: _Part) -> int:
        batch = self.dataset.batch_in(self.slots[part.slot], self.batch_size)
        self.dataset.fill(batch, part.first, part.visits)
        return part.slot


def ring_batches(
    dataset: FillsBatches[Batch],
    device: torch.device,
    workers: int,
    batch_sampler: Any,
    batch_size: int,
    held: int = 1,
) -> Iterator[Batch]:
    """Batches of a data set, written by worker processes into a ring of slots. They stay on the CPU.

    A batch is valid until `held` more have been asked for; then its memory is written anew. With `held` = 1, use a
    batch before you ask for the next one, or copy it.

    Args:
        dataset: writes the samples.
        device: where the batches will be used; for a GPU the slots are pinned.
        workers: as `--workers`; with 0, this process writes, into ordinary memory.
        batch_sampler: for each batch what its samples are, all of `batch_size`; it has a length.
        batch_size: samples in a batch.
        held: number of latest batches that stay valid, at least 1.

    Raises:
        OneProcessError: the slots don't fit into memory, or a worker met bad data or was killed.
    """
    workers = workers_that_fit(worker_count(workers))
    plan = RingPlan.of(batch_size, len(batch_sampler), workers, held)
    slots = _slots(plan, dataset.batch_bytes(batch_size), batch_size)
    filled = [dataset.batch_in(slot, batch_size) for slot in slots]
    parts = _Parts(batch_sampler, len(batch_sampler), plan)
    written = batches(
        _SlotWriter(dataset, slots, batch_size),
        torch.device("cpu"),  # what it returns needs no pinned memory
        workers,
        sampler=parts,
        collate=as_is,
        prefetch=plan.prefetch,
    )
    with pinned_in_place(slots, device):
        for number in range(len(batch_sampler)):
            parts.wanted = number
            for _ in range(plan.parts):
                slot = next(written)
            yield filled[slot]


def _slots(plan: RingPlan, slot_bytes: int, batch_size: int) -> torch.Tensor:
    """The slots' memory, uint8 [slots, slot_bytes].

    Raises:
        OneProcessError: it isn't there.
    """
    if plan.parts_ahead == 0:
        return torch.empty(plan.slots, slot_bytes, dtype=torch.uint8)
    # The other processes on this machine are about to take as much.
    needed, available = local_processes() * plan.slots * slot_bytes, available_for_sharing()
    if available is None or needed <= available:
        with contextlib.suppress(OSError):
            return shared_memory(plan.slots * slot_bytes).view(plan.slots, slot_bytes)
    smaller = 2 ** max(0, int(math.log2(max(1, batch_size * (available or 0) / needed))))
    raise OneProcessError(
        f"the loading workers need {needed / 1e9:.1f} GB of shared memory for batches of {batch_size}, "
        f"and {(available or 0) / 1e9:.1f} GB are free; use --micro-batch {smaller} or fewer --workers"
    )

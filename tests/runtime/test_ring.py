"""Batches come out of the ring whole, in order and unchanged while they are held; what can't be had is one line."""

import itertools
import math
import time

import pytest
import torch

from fastmae.errors import InputError
from fastmae.runtime import ring
from fastmae.runtime.ring import FillsBatches, RingPlan, ring_batches

CPU = torch.device("cpu")


class Numbers:
    """Rows of eight equal numbers."""

    def batch_bytes(self, size):
        return 64 * size

    def batch_in(self, memory, size):
        return memory.view(torch.int64).view(size, 8)

    def fill(self, batch, first, visits):
        batch[first : first + len(visits)] = torch.tensor(visits)[:, None]


class Failing(Numbers):
    """Can't give the number 13."""

    def fill(self, batch, first, visits):
        if 13 in visits:
            raise InputError("image 13: damaged")
        super().fill(batch, first, visits)


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 2 to 4 rows."""
    monkeypatch.setattr(ring, "SMALLEST_PART", 2)
    monkeypatch.setattr(ring, "LARGEST_PART", 4)


def visits(batches, size):
    return [list(range(number * size, (number + 1) * size)) for number in range(batches)]


@pytest.mark.parametrize("held", [1, 2])
@pytest.mark.parametrize(("workers", "size"), [(0, 9), (1, 9), (3, 7), (2, 1)])
def test_every_batch_is_whole_and_stays_as_it_is_while_it_is_held(workers, size, held, small_parts):
    assert isinstance(Numbers(), FillsBatches)
    count, latest = 14, []
    for number, batch in enumerate(ring_batches(Numbers(), CPU, workers, visits(count, size), size, held)):
        latest = [*latest, (number, batch)][-held:]
        if number % 5 == 4:
            time.sleep(0.02)  # the workers run ahead as far as they may
        for held_number, held_batch in latest:
            expected = torch.arange(held_number * size, (held_number + 1) * size)
            assert torch.equal(held_batch, expected[:, None].expand(size, 8))
    assert number == count - 1


@pytest.mark.parametrize("workers", [0, 1, 2, 5, 14, 62])
def test_a_slot_is_handed_out_again_only_after_its_batch_is_given_up(workers):
    for size, count, held in itertools.product((1, 64, 100, 256, 1000, 4096), (1, 3, 40), (1, 2)):
        plan = RingPlan.of(size, count, workers, held)
        assert plan.parts == math.ceil(size / plan.part_size)
        handed_out = plan.parts_ahead  # as torch's DataLoader does
        for received in range(count * plan.parts):
            wanted = received // plan.parts
            handed_out = min(count * plan.parts, max(handed_out + (workers > 0), received + 1))
            newest = (handed_out - 1) // plan.parts
            in_use = range(max(0, wanted + 1 - held), wanted + 1)
            written = range(wanted + 1, newest + 1)
            slots = [number % plan.slots for number in (*in_use, *written)]
            assert len(set(slots)) == len(slots)


@pytest.mark.parametrize("workers", [1, 2, 6, 14, 30, 62])
def test_a_large_batch_takes_five_slots_at_most_and_a_small_one_little_memory(workers):
    assert RingPlan.of(4096, 1000, workers, held=2).slots <= 5
    plan = RingPlan.of(256, 1000, workers, held=2)
    assert plan.slots * 256 <= 2 * workers * ring.SMALLEST_PART + 5 * 256
    assert plan.parts_ahead >= ring.BATCHES_AHEAD * plan.parts


def test_there_are_never_more_slots_than_batches():
    assert RingPlan.of(256, 2, 8, held=2).slots == 2
    assert RingPlan.of(256, 0, 8, held=1).slots == 1
    assert list(ring_batches(Numbers(), CPU, 2, [], 4)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_data_is_one_line_with_and_without_workers(workers, small_parts):
    received = []
    with pytest.raises(InputError) as caught:
        for batch in ring_batches(Failing(), CPU, workers, visits(4, 6), 6):
            received.append(batch[0, 0].item())
    assert (received, str(caught.value)) == ([0, 6], "image 13: damaged")


def test_a_ring_that_does_not_fit_into_memory_is_one_line_with_a_way_out(monkeypatch):
    monkeypatch.setattr(ring, "available_for_sharing", lambda: 1_200_000)
    with pytest.raises(InputError) as caught:
        next(ring_batches(Numbers(), CPU, 1, visits(20, 20_000), 20_000))
    line = str(caught.value)
    assert "\n" not in line
    assert "batches of 20000" in line
    assert "--micro-batch 4096 or fewer --workers" in line
    # What the line advises fits.
    assert next(ring_batches(Numbers(), CPU, 1, visits(20, 4096), 4096)).shape == (4096, 8)


def test_more_memory_than_the_machine_can_map_is_the_same_line(monkeypatch):
    def full(count):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(ring, "shared_memory", full)
    with pytest.raises(InputError, match=r"shared memory for batches of 8, .*--micro-batch"):
        next(ring_batches(Numbers(), CPU, 1, visits(20, 8), 8))


def test_all_processes_of_a_machine_count(monkeypatch):
    monkeypatch.setattr(ring, "available_for_sharing", lambda: 50_000)
    assert next(ring_batches(Numbers(), CPU, 1, visits(4, 64), 64)).shape == (64, 8)
    monkeypatch.setattr(ring, "local_processes", lambda: 8)
    with pytest.raises(InputError, match=r"shared memory for batches of 64"):
        next(ring_batches(Numbers(), CPU, 1, visits(4, 64), 64))

from itertools import pairwise

import numpy as np
import pytest

from fastmae.training.sampler import ShuffleOrder, StepSampler


def test_every_image_is_visited_once_an_epoch_and_none_is_dropped():
    visits = [visit for batch in StepSampler(images=10, batch_size=4, steps=10, seed=0) for visit in batch]
    assert len(visits) == 40
    for epoch in range(4):
        assert sorted(index for e, index in visits if e == epoch) == list(range(10))


def test_epochs_are_shuffled_differently_and_a_seed_repeats():
    def first_epochs(seed):
        visits = [visit for batch in StepSampler(50, 50, 2, seed) for visit in batch]
        return [index for e, index in visits if e == 0], [index for e, index in visits if e == 1]

    zero, one = first_epochs(0)
    assert zero != one
    assert first_epochs(0) == (zero, one)
    assert first_epochs(1)[0] != zero


def test_a_resumed_sampler_gives_the_steps_that_were_left():
    whole = list(StepSampler(10, 4, 9, seed=2))
    assert list(StepSampler(10, 4, 9, seed=2, start_step=5)) == whole[5:]
    assert len(StepSampler(10, 4, 9, seed=2, start_step=5)) == 4


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_out_the_same_global_batches(world_size):
    alone = list(StepSampler(10, 8, 5, seed=1))
    parts = [list(StepSampler(10, 8, 5, seed=1, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, batch in enumerate(alone):
        assert [visit for part in parts for visit in part[step]] == batch


def test_accumulated_parts_make_up_the_same_share():
    for rank in range(2):
        whole = list(StepSampler(10, 8, 5, seed=1, rank=rank, world_size=2))
        parts = list(StepSampler(10, 8, 5, seed=1, rank=rank, world_size=2, grad_accum_steps=2))
        assert [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)] == whole
    resumed = StepSampler(10, 8, 5, seed=1, start_step=3, grad_accum_steps=2)
    assert list(resumed) == list(StepSampler(10, 8, 5, seed=1, grad_accum_steps=2))[6:]
    assert len(resumed) == 4


def test_a_batch_may_be_larger_than_the_data():
    (batch,) = StepSampler(3, 8, 1, seed=0)
    assert [epoch for epoch, _ in batch] == [0, 0, 0, 1, 1, 1, 2, 2]


SIZES = [7, 0, 12, 5, 9, 0, 3, 8, 11, 6]


def shards_of(sizes, images):
    return np.repeat(np.arange(len(sizes)), sizes)[images]


@pytest.mark.parametrize("window", [0, 1, 3, 4, 10])
def test_any_window_visits_every_image_once_an_epoch_and_epochs_differ(window):
    order = ShuffleOrder(SIZES, seed=3, window=window)
    for epoch in range(3):
        assert sorted(order.epoch(epoch)) == list(range(61))
        assert order.epoch(epoch).tolist() != order.epoch(epoch + 1).tolist()
    assert (
        order.epoch(0).tolist()
        == ShuffleOrder(SIZES, 3, window).epoch(0).tolist()
        != ShuffleOrder(SIZES, 4, window).epoch(0).tolist()
    )


@pytest.mark.parametrize("window", [0, 10, 99])
def test_no_window_or_one_over_all_shards_is_the_full_shuffle(window):
    for epoch in range(3):
        expected = np.random.default_rng((3, epoch)).permutation(61)
        assert np.array_equal(ShuffleOrder(SIZES, 3, window).epoch(epoch), expected)
    order = ShuffleOrder(SIZES, 3, window)
    assert list(StepSampler(61, 8, 20, 3, order=order)) == list(StepSampler(61, 8, 20, 3))


def test_each_group_is_the_next_shards_of_the_shuffled_ones_and_is_shuffled_among_itself():
    order = ShuffleOrder(SIZES, seed=3, window=4)
    for epoch in range(2):
        shards = np.random.default_rng((3, epoch)).permutation(10)
        images, first = order.epoch(epoch), 0
        for group in (shards[:4], shards[4:8], shards[8:]):
            of_group = np.flatnonzero(np.isin(shards_of(SIZES, np.arange(61)), group))
            visited = images[first : first + len(of_group)]
            assert sorted(visited) == of_group.tolist()
            assert len(of_group) < 6 or sorted(visited) != visited.tolist()
            first += len(of_group)


def test_a_batch_comes_from_about_a_windows_shards_and_neighbours_change_over_epochs():
    order, shards, size, window = ShuffleOrder([100] * 64, seed=0, window=8), 64, 100, 8
    visited = np.stack([order.epoch(epoch) for epoch in range(30)])
    of_batch = [len(np.unique(batch // size)) for batch in visited.reshape(-1, 160)]
    assert (min(of_batch), max(of_batch)) == (8, 8)  # five batches a group: none spans two
    # Shards that were in one group with shard 0 at least once: each other one misses an epoch with probability 1 - 7 / 63.
    with_zero = [
        set((group // size).tolist())
        for groups in visited.reshape(30, 8, 800)
        for group in groups
        if 0 in group // size
    ]
    assert abs(len(set().union(*with_zero)) - 1 - 63 * (1 - (1 - 7 / 63) ** 30)) < 4
    # A pair of neighbours is one again with probability 1 / 800 when both are in one group: always within a shard, 7 / 63 across.
    pairs = [set(zip(epoch[:-1].tolist(), epoch[1:].tolist(), strict=True)) for epoch in visited]
    again = np.mean([len(a & b) for a, b in pairwise(pairs)])
    same = (size - 1) / (window * size - 1)
    assert abs(again - shards * size * (same + (1 - same) * 7 / 63) / 800) < 1


@pytest.mark.parametrize("window", [0, 1, 3])
def test_the_shards_ahead_are_the_next_that_visits_need_across_the_epochs_end(window):
    order = ShuffleOrder(SIZES, seed=5, window=window)
    visits = np.concatenate([shards_of(SIZES, order.epoch(epoch)) for epoch in range(3)]).tolist()
    for offset in (0, 1, 30, 59, 60):
        needed = list(dict.fromkeys(visits[offset:]))
        assert sorted(needed) == [0, 2, 3, 4, 6, 7, 8, 9]
        for count in (1, 4, 8, 20):
            assert order.shards_ahead(0, offset, count) == needed[:count]
        assert order.shards_ahead(0, offset, 20, visits=9) == list(dict.fromkeys(visits[offset : offset + 9]))


def test_a_sampler_names_the_shards_of_its_coming_steps_and_none_after_the_last():
    sampler = StepSampler(61, 8, 10, seed=5, order=ShuffleOrder(SIZES, seed=5, window=2))
    coming = [int(shards_of(SIZES, index)) for batch in sampler for _, index in batch]
    for step in (0, 5, 9):
        assert sampler.shards_ahead(step, 5) == list(dict.fromkeys(coming[8 * step :]))[:5]
    assert sampler.shards_ahead(10, 5) == []


@pytest.mark.parametrize("window", [0, 3])
def test_a_window_keeps_resumed_and_shared_out_batches(window):
    def sampler(*more, **options):
        return StepSampler(61, 8, 20, 1, *more, order=ShuffleOrder(SIZES, 1, window), **options)

    whole = list(sampler())
    assert list(sampler(7)) == whole[7:]
    parts = [list(sampler(rank=rank, world_size=2)) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_an_order_over_more_than_one_look_ahead_names_every_shard():
    order = ShuffleOrder([3000] * 5, seed=0, window=1)
    assert sorted(order.shards_ahead(0, 2999, 5)) == list(range(5))
    assert order.shards_ahead(0, 14999, 2)[0] == order.epoch(0)[-1] // 3000

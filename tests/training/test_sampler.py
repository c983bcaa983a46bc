"""The order of the images: shuffled, cut into batches, shared out to processes, resumed."""

from itertools import pairwise

import numpy as np
import pytest

from fastmae.training.sampler import ShuffleOrder, StepSampler


def test_every_image_is_visited_once_an_epoch_and_none_is_dropped():
    visits = [visit for batch in StepSampler(images=10, batch_size=4, steps=10, seed=0) for visit in batch]
    assert len(visits) == 40
    for epoch in range(4):
        assert sorted(index for e, index in visits if e == epoch) == list(range(10))


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    def first_epochs(seed):
        visits = [visit for batch in StepSampler(50, 50, 2, seed) for visit in batch]
        return [index for e, index in visits if e == 0], [index for e, index in visits if e == 1]

    first, second = first_epochs(0)
    assert first != second
    assert first_epochs(0) == (first, second)
    assert first_epochs(1)[0] != first


def test_the_full_shuffle_is_numpys_permutation_of_seed_and_epoch():
    order = ShuffleOrder([30, 0, 70], seed=3)
    for epoch in (0, 5):
        assert order.epoch(epoch).dtype == np.int32
        assert (order.epoch(epoch) == np.random.default_rng((3, epoch)).permutation(100)).all()


def test_a_resumed_sampler_continues_with_the_same_batches():
    whole = list(StepSampler(10, 4, 9, seed=2))
    assert list(StepSampler(10, 4, 9, seed=2, start_step=5)) == whole[5:]
    assert len(StepSampler(10, 4, 9, seed=2, start_step=5)) == 4


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_processes_shares_make_up_the_batches_of_a_single_process(world_size):
    batches = list(StepSampler(10, 8, 5, seed=1))
    shares = [list(StepSampler(10, 8, 5, seed=1, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, batch in enumerate(batches):
        assert [visit for share in shares for visit in share[step]] == batch


def test_micro_batches_make_up_a_processs_share():
    for rank in range(2):
        shares = list(StepSampler(10, 8, 5, seed=1, rank=rank, world_size=2))
        micro_batches = list(StepSampler(10, 8, 5, seed=1, rank=rank, world_size=2, grad_accum_steps=2))
        assert [a + b for a, b in zip(micro_batches[::2], micro_batches[1::2], strict=True)] == shares
    resumed = StepSampler(10, 8, 5, seed=1, start_step=3, grad_accum_steps=2)
    assert list(resumed) == list(StepSampler(10, 8, 5, seed=1, grad_accum_steps=2))[6:]
    assert len(resumed) == 4


def test_a_batch_may_hold_more_images_than_the_data():
    (batch,) = StepSampler(3, 8, 1, seed=0)
    assert [epoch for epoch, _ in batch] == [0, 0, 0, 1, 1, 1, 2, 2]


SIZES = [7, 0, 12, 5, 9, 0, 3, 8, 11, 6]


def shards_of(sizes, images):
    """The shard of each image."""
    return np.repeat(np.arange(len(sizes)), sizes)[images]


@pytest.mark.parametrize("window", [0, 1, 3, 4, 10])
def test_with_any_window_every_image_is_visited_once_an_epoch_and_each_epoch_differs(window):
    order = ShuffleOrder(SIZES, seed=3, window=window)
    for epoch in range(3):
        assert sorted(order.epoch(epoch)) == list(range(61))
        assert order.epoch(epoch).tolist() != order.epoch(epoch + 1).tolist()
    same_seed, other_seed = (ShuffleOrder(SIZES, seed, window).epoch(0).tolist() for seed in (3, 4))
    assert order.epoch(0).tolist() == same_seed != other_seed


@pytest.mark.parametrize("window", [0, 10, 99])
def test_without_a_window_or_with_one_over_all_shards_the_shuffle_is_full(window):
    for epoch in range(3):
        expected = np.random.default_rng((3, epoch)).permutation(61)
        assert np.array_equal(ShuffleOrder(SIZES, 3, window).epoch(epoch), expected)
    order = ShuffleOrder(SIZES, 3, window)
    assert list(StepSampler(61, 8, 20, 3, order=order)) == list(StepSampler(61, 8, 20, 3))


def test_the_shards_are_shuffled_and_each_window_of_them_is_shuffled_among_itself():
    order = ShuffleOrder(SIZES, seed=3, window=4)
    for epoch in range(2):
        shards = np.random.default_rng((3, epoch)).permutation(10)
        images, first = order.epoch(epoch), 0
        for window in (shards[:4], shards[4:8], shards[8:]):
            images_of_window = np.flatnonzero(np.isin(shards_of(SIZES, np.arange(61)), window))
            visited = images[first : first + len(images_of_window)]
            assert sorted(visited) == images_of_window.tolist()
            assert len(images_of_window) < 6 or sorted(visited) != visited.tolist()
            first += len(images_of_window)


def test_a_batch_mixes_the_shards_of_its_window():
    epoch = ShuffleOrder([100] * 64, seed=0, window=8).epoch(0)
    shards_of_batches = [len(np.unique(batch // 100)) for batch in epoch.reshape(-1, 160)]
    assert set(shards_of_batches) == {8}  # five batches per window: none spans two


def test_windows_bring_other_shards_together_in_each_epoch():
    shards, size, window, epochs = 64, 100, 8, 30
    order = ShuffleOrder([size] * shards, seed=0, window=window)
    visited = np.stack([order.epoch(epoch) for epoch in range(epochs)])
    windows = visited.reshape(-1, window * size) // size
    together_with_shard_0 = set().union(*(group.tolist() for group in windows if 0 in group)) - {0}
    # Another shard is outside shard 0's window in an epoch with probability 1 - 7 / 63.
    expected = 63 * (1 - (1 - 7 / 63) ** epochs)
    assert abs(len(together_with_shard_0) - expected) < 4


def test_windows_separate_neighbouring_images_in_the_next_epoch():
    shards, size, window, epochs = 64, 100, 8, 30
    order = ShuffleOrder([size] * shards, seed=0, window=window)
    visited = [order.epoch(epoch).tolist() for epoch in range(epochs)]
    neighbours = [set(pairwise(epoch)) for epoch in visited]
    repeated = np.mean([len(now & later) for now, later in pairwise(neighbours)])
    # Two images of one window are neighbours with probability 1 / 800. Those of one shard are in one window again, and
    # those of two shards with probability 7 / 63.
    same_shard = (size - 1) / (window * size - 1)
    expected = shards * size * (same_shard + (1 - same_shard) * 7 / 63) / (window * size)
    assert abs(repeated - expected) < 1


@pytest.mark.parametrize("window", [0, 1, 3])
def test_the_shards_ahead_are_those_of_the_next_visits_also_beyond_the_epochs_end(window):
    order = ShuffleOrder(SIZES, seed=5, window=window)
    visits = np.concatenate([shards_of(SIZES, order.epoch(epoch)) for epoch in range(3)]).tolist()
    for offset in (0, 1, 30, 59, 60):
        needed = list(dict.fromkeys(visits[offset:]))
        assert sorted(needed) == [0, 2, 3, 4, 6, 7, 8, 9]
        for count in (1, 4, 8, 20):
            assert order.shards_ahead(0, offset, count) == needed[:count]
        assert order.shards_ahead(0, offset, 20, visits=9) == list(dict.fromkeys(visits[offset : offset + 9]))


def test_a_sampler_names_the_shards_of_its_next_steps_and_none_after_the_last():
    sampler = StepSampler(61, 8, 10, seed=5, order=ShuffleOrder(SIZES, seed=5, window=2))
    shards = [int(shards_of(SIZES, index)) for batch in sampler for _, index in batch]
    for step in (0, 5, 9):
        assert sampler.shards_ahead(step, 5) == list(dict.fromkeys(shards[8 * step :]))[:5]
    assert sampler.shards_ahead(10, 5) == []


@pytest.mark.parametrize("window", [0, 3])
def test_batches_are_resumed_and_shared_out_alike_with_and_without_a_window(window):
    def sampler(**options):
        return StepSampler(61, 8, 20, 1, order=ShuffleOrder(SIZES, 1, window), **options)

    batches = list(sampler())
    assert list(sampler(start_step=7)) == batches[7:]
    shares = [list(sampler(rank=rank, world_size=2)) for rank in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == batches


def test_the_shards_ahead_may_lie_further_than_one_look_ahead():
    order = ShuffleOrder([3000] * 5, seed=0, window=1)
    assert sorted(order.shards_ahead(0, 2999, 5)) == list(range(5))
    assert order.shards_ahead(0, 14999, 2)[0] == order.epoch(0)[-1] // 3000

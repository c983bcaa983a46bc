import pytest

from fastmae.training.sampler import StepSampler


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
        parts = list(StepSampler(10, 8, 5, seed=1, rank=rank, world_size=2, parts=2))
        assert [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)] == whole
    resumed = StepSampler(10, 8, 5, seed=1, start_step=3, parts=2)
    assert list(resumed) == list(StepSampler(10, 8, 5, seed=1, parts=2))[6:]
    assert len(resumed) == 4


def test_a_batch_may_be_larger_than_the_data():
    (batch,) = StepSampler(3, 8, 1, seed=0)
    assert [epoch for epoch, _ in batch] == [0, 0, 0, 1, 1, 1, 2, 2]

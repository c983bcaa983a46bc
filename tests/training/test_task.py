"""The numbers that follow from the size of a run."""

import pytest

from fastmae.training.task import Settings


def settings(images, epochs, batch_size, warmup_epochs=0.0):
    return Settings(images, epochs, batch_size, lr=0.1, warmup_epochs=warmup_epochs)


@pytest.mark.parametrize(
    ("images", "epochs", "batch_size", "steps"), [(12, 4, 4, 12), (30, 6, 8, 23), (10, 1, 64, 1), (3, 8, 8, 3)]
)
def test_the_last_step_of_a_run_completes_its_last_epoch(images, epochs, batch_size, steps):
    assert settings(images, epochs, batch_size).steps == steps
    assert settings(images, epochs, batch_size).steps_per_epoch == images / batch_size


@pytest.mark.parametrize(("warmup_epochs", "warmup_steps"), [(0, 0), (1, 4), (1.5, 6), (3, 11), (100, 11)])
def test_the_warm_up_takes_at_most_half_of_the_run(warmup_epochs, warmup_steps):
    assert settings(30, 6, 8, warmup_epochs).warmup_steps == warmup_steps  # 23 steps, 3.75 per epoch


def test_the_epoch_grows_with_the_steps_but_not_beyond_the_last_one():
    run = settings(30, 6, 8)
    assert run.epoch_of(0) == 0
    assert run.epoch_of(15) == 4
    assert run.epoch_of(22) == pytest.approx(22 / 3.75)
    assert run.epoch_of(23) == 6  # 23 steps visit 184 images, four more than six epochs have


def test_a_batch_may_span_several_epochs():
    run = settings(3, 8, 8)
    assert [run.epoch_of(step) for step in range(4)] == pytest.approx([0, 8 / 3, 16 / 3, 8])

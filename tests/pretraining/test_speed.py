from types import SimpleNamespace

import pytest

from fastmae.cli import parse
from fastmae.pretraining import speed
from fastmae.pretraining.speed import fitted_to_time, images_per_second


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_the_speed_counts_the_images_of_the_timed_steps_and_nothing_is_written(
    micro_batch, vit_store, tiny_student, tmp_path, monkeypatch
):
    times = iter([100.0, 101.0, 101.5, 102.0])  # at the first timed step, after the second and the third, at the end
    monkeypatch.setattr(speed, "time", SimpleNamespace(monotonic=lambda: next(times)))
    options = [*tiny_student, "--workers", "0", "--micro-batch", str(micro_batch)]
    config = parse("pretrain", [str(vit_store), str(tmp_path / "run"), *options])
    assert images_per_second(config, timed_steps=3, enough_seconds=60) == 3 * 8 / 2
    assert not (tmp_path / "run").exists()


def test_a_short_run_is_timed_over_as_many_steps_as_a_long_one(vit_store, tiny_student, tmp_path, monkeypatch):
    steps = []
    original = speed.train_step
    monkeypatch.setattr(speed, "train_step", lambda run, batches: steps.append(original(run, batches)))
    options = [*tiny_student, "--workers", "0", "--epochs", "1", "--batch-size", "32"]
    images_per_second(parse("pretrain", [str(vit_store), str(tmp_path / "run"), *options]), 2, enough_seconds=60)
    assert len(steps) == 4
    assert all(scalars["loss"] > 0 for scalars in steps)


@pytest.mark.parametrize(("enough_seconds", "timed_steps"), [(4.5, 5), (2.5, 3), (0.1, 2), (100.0, 6)])
def test_fewer_steps_are_timed_where_they_are_slow(
    enough_seconds, timed_steps, vit_store, tiny_student, tmp_path, monkeypatch
):
    clock = one_second_steps(monkeypatch)
    config = parse("pretrain", [str(vit_store), str(tmp_path / "run"), *tiny_student, "--workers", "0"])
    assert images_per_second(config, 6, enough_seconds) == 8
    assert clock[0] == speed.WARMUP_STEPS + timed_steps


def test_measuring_the_speed_takes_no_longer_than_the_run_that_is_fitted(
    vit_store, tiny_student, tmp_path, monkeypatch
):
    clock = one_second_steps(monkeypatch)
    config = parse("pretrain", [str(vit_store), str(tmp_path / "run"), *tiny_student, "--workers", "0"])
    fitted = fitted_to_time(config, seconds=3.5, timed_steps=60)
    assert clock[0] == speed.WARMUP_STEPS + 4
    assert fitted.epochs == pytest.approx(3.5 * 8 / 30, abs=0.01)


def one_second_steps(monkeypatch):
    """Make every step take a second of the clock that is returned."""
    clock = [0.0]
    monkeypatch.setattr(speed, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    original = speed.train_step

    def slow_step(run, batches):
        clock[0] += 1
        return original(run, batches)

    monkeypatch.setattr(speed, "train_step", slow_step)
    return clock

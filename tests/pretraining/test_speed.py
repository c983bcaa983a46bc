import pytest

from fastmae.cli import parse
from fastmae.pretraining import speed
from fastmae.pretraining.speed import images_per_second


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_the_speed_counts_the_images_of_the_timed_steps_and_nothing_is_written(
    micro_batch, vit_store, tiny_student, tmp_path, monkeypatch
):
    times = iter([100.0, 102.0])  # at the first timed step, and after the last
    monkeypatch.setattr(speed.time, "monotonic", lambda: next(times))
    options = [*tiny_student, "--workers", "0", "--micro-batch", str(micro_batch)]
    config = parse("pretrain", [str(vit_store), str(tmp_path / "run"), *options])
    assert images_per_second(config, timed_steps=3) == 3 * 8 / 2
    assert not (tmp_path / "run").exists()


def test_a_short_run_is_timed_over_as_many_steps_as_a_long_one(vit_store, tiny_student, tmp_path, monkeypatch):
    steps = []
    original = speed.train_step
    monkeypatch.setattr(speed, "train_step", lambda run, batches: steps.append(original(run, batches)))
    options = [*tiny_student, "--workers", "0", "--epochs", "1", "--batch-size", "32"]
    images_per_second(parse("pretrain", [str(vit_store), str(tmp_path / "run"), *options]), timed_steps=2)
    assert len(steps) == 4
    assert all(scalars["loss"] > 0 for scalars in steps)

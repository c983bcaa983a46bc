"""The training loop: what it logs, when it evaluates and saves, and how it fails."""

import time
from dataclasses import replace

import pytest
import torch

from fastmae.errors import FailedCheckError, InputError
from fastmae.runs.checkpoint import load_checkpoint
from fastmae.runs.folder import read_evaluations, read_metrics
from fastmae.training.driver import train


def counting(task, value_at=float):
    """The task with one more scalar, `value`: by default the number of the call of its step, from 1."""
    calls, step = 0, task.step

    def count(model, batch):
        nonlocal calls
        calls += 1
        return {**step(model, batch), "value": torch.tensor(value_at(calls))}

    return replace(task, step=count)


def test_a_log_entry_has_the_means_since_the_one_before(sums_task, options, settings):
    task = counting(sums_task())
    train(options(log_every=5), task, settings)
    entries = read_metrics(task.out)
    assert [entry["step"] for entry in entries] == [5, 10, 12]
    assert [entry["value"] for entry in entries] == [3, 8, 11.5]
    assert [entry["epoch"] for entry in entries] == [1.6667, 3.3333, 4.0]
    assert all(entry["images_per_second"] > 0 for entry in entries)


def test_the_mean_of_accumulated_micro_batches_is_logged(sums_task, options, settings):
    task = counting(sums_task())
    train(options(micro_batch=2), task, settings)
    assert [entry["value"] for entry in read_metrics(task.out)][:3] == [1.5, 3.5, 5.5]


def test_a_run_is_evaluated_regularly_and_after_the_last_step(sums_task, options, settings):
    task = sums_task(evaluate=lambda *_: {"top1": 1.0})
    train(options(), task, replace(settings, eval_every=1.5))  # 4.5 steps
    assert [entry["step"] for entry in read_evaluations(task.out)] == [5, 10, 12]


def test_the_time_of_an_evaluation_does_not_count_as_training(sums_task, options, settings):
    def evaluate(*_):
        time.sleep(0.4)
        return {"top1": 1.0}

    start = time.monotonic()
    result = train(options(), sums_task(evaluate=evaluate), replace(settings, eval_every=2))
    assert result["seconds"] <= time.monotonic() - start - 2 * 0.4


def test_evaluating_leaves_the_network_in_training_mode_with_gradients(sums_task, options, settings):
    modes = []

    def evaluate(network, _):
        modes.append((network.training, torch.is_grad_enabled()))
        return {"top1": 1.0}

    task = sums_task(evaluate=evaluate)
    step = task.step

    def note_mode(model, batch):
        modes.append((task.network.training, torch.is_grad_enabled()))
        return step(model, batch)

    train(options(), replace(task, step=note_mode), replace(settings, eval_every=2))
    assert modes == 2 * (6 * [(True, True)] + [(False, False)])


def test_the_moving_average_is_what_is_evaluated(sums_task, options, settings):
    evaluated = []
    task = sums_task(evaluate=lambda network, _: evaluated.append(network) or {"top1": 1.0})
    train(options(ema=0.9), task, replace(settings, eval_every=2))
    average = load_checkpoint(task.out / "checkpoint.pt")["ema"]["weight"]
    assert torch.equal(evaluated[-1].weight, average)
    assert not torch.equal(task.network.weight, average)


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good_checkpoint(sums_task, options, settings):
    task = counting(sums_task(lr_flag="--base-lr"), lambda call: float("nan") if call == 4 else 0.0)
    with pytest.raises(FailedCheckError, match="--base-lr"):
        train(options(save_every=0), task, settings)
    assert load_checkpoint(task.out / "checkpoint.pt")["step"] == 3


def test_the_run_is_saved_before_it_fails_on_damaged_data(sums_task, options, settings):
    def four_batches(batches, _):
        for _, batch in zip(range(4), batches, strict=False):
            yield batch
        raise InputError("shard 3 is damaged")

    task = sums_task(wrap_batches=four_batches)
    with pytest.raises(InputError, match="shard 3"):
        train(options(), task, settings)
    assert load_checkpoint(task.out / "checkpoint.pt")["step"] == 4

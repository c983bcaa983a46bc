"""The training loop: what it logs, when it evaluates and saves, and how it fails."""

import itertools
import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from fastmae.errors import FailedCheckError, InputError, InterruptedRunError, notes_of
from fastmae.runs.checkpoint import load_checkpoint
from fastmae.runs.folder import read_evaluations, read_metrics
from fastmae.training.driver import train
from fastmae.training.state import TrainState
from fastmae.training.task import Evaluated, Picture


def saved_step(task):
    return load_checkpoint(task.out / "checkpoint.pt")["step"]


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
    task = sums_task(evaluate=lambda *_: Evaluated({"top1": 1.0}))
    train(options(), task, replace(settings, eval_every=1.5))  # 4.5 steps
    assert [entry["step"] for entry in read_evaluations(task.out)] == [5, 10, 12]


def test_the_time_of_an_evaluation_does_not_count_as_training(sums_task, options, settings):
    def evaluate(*_):
        time.sleep(0.4)
        return Evaluated({"top1": 1.0})

    start = time.monotonic()
    result = train(options(), sums_task(evaluate=evaluate), replace(settings, eval_every=2))
    assert result["seconds"] <= time.monotonic() - start - 2 * 0.4


def test_evaluating_leaves_the_network_in_training_mode_with_gradients(sums_task, options, settings):
    modes = []

    def evaluate(network, _):
        modes.append((network.training, torch.is_grad_enabled()))
        return Evaluated({"top1": 1.0})

    task = sums_task(evaluate=evaluate)
    step = task.step

    def note_mode(model, batch):
        modes.append((task.network.training, torch.is_grad_enabled()))
        return step(model, batch)

    train(options(), replace(task, step=note_mode), replace(settings, eval_every=2))
    assert modes == 2 * (6 * [(True, True)] + [(False, False)])


def test_the_moving_average_is_what_is_evaluated(sums_task, options, settings):
    evaluated = []
    task = sums_task(evaluate=lambda network, _: evaluated.append(network) or Evaluated({"top1": 1.0}))
    train(options(ema=0.9), task, replace(settings, eval_every=2))
    average = load_checkpoint(task.out / "checkpoint.pt")["ema"]["weight"]
    assert torch.equal(evaluated[-1].weight, average)
    assert not torch.equal(task.network.weight, average)


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good_checkpoint(sums_task, options, settings):
    task = counting(sums_task(lr_flag="--base-lr"), lambda call: float("nan") if call == 4 else 0.0)
    with pytest.raises(FailedCheckError, match="--base-lr"):
        train(options(save_every=0), task, settings)
    assert load_checkpoint(task.out / "checkpoint.pt")["step"] == 3


@pytest.mark.promise("saved")
def test_the_run_is_saved_before_it_fails_on_damaged_data(sums_task, options, settings):
    def four_batches(batches, _):
        for _, batch in zip(range(4), batches, strict=False):
            yield batch
        raise InputError("shard 3 is damaged")

    task = sums_task(wrap_batches=four_batches)
    with pytest.raises(InputError, match="shard 3") as caught:
        train(options(), task, settings)
    assert saved_step(task) == 4
    assert list(notes_of(caught.value)) == ["step 4 is saved"]


def failing_at(step, error, task, function):
    """The task whose `function`, 'step' or the optimizer's, fails at a step, from 1."""
    calls = itertools.count(1)

    def failing(original, *args, **kwargs):
        if next(calls) == step:
            raise error
        return original(*args, **kwargs)

    if function == "step":
        return replace(task, step=partial(failing, task.step))

    def optimizer(groups, lr):
        built = torch.optim.SGD(groups, lr)
        built.step = partial(failing, built.step)
        return built

    return replace(task, optimizer=optimizer)


@pytest.mark.promise("saved")
@pytest.mark.parametrize("error", [TypeError("a bug"), OSError(5, "Input/output error"), RuntimeError("unknown")])
def test_whatever_ends_a_run_it_is_saved_first_and_goes_on_to_the_same_weights(error, sums_task, options, settings):
    unbroken = sums_task(out=sums_task().out.with_name("unbroken"))
    train(options(), unbroken, settings)
    with pytest.raises(type(error)) as caught:
        train(options(), failing_at(6, error, sums_task(), "step"), settings)
    assert list(notes_of(caught.value)) == ["step 5 is saved"]
    task = sums_task()
    train(options(), task, settings)
    assert torch.equal(task.network.weight, unbroken.network.weight)


@pytest.mark.promise("machine")
@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_a_full_memory_is_a_line_with_a_way_out_and_the_run_is_saved(error, sums_task, options, settings):
    task = failing_at(3, error, sums_task(), "step")
    with pytest.raises(InputError, match=r"out of memory; give --micro-batch 2 \(now 4\), and the same call continues"):
        train(options(), task, settings)
    assert saved_step(task) == 2


@pytest.mark.promise("saved")
def test_a_state_that_the_optimizer_was_changing_is_not_saved(sums_task, options, settings):
    task = failing_at(6, TypeError("a bug"), sums_task(), "optimizer")
    with pytest.raises(TypeError) as caught:
        train(options(), task, settings)
    assert not (task.out / "checkpoint.pt").exists()
    assert list(notes_of(caught.value)) == ["nothing is saved yet"]


@pytest.mark.promise("saved")
def test_a_run_that_can_not_even_be_saved_ends_with_what_ended_it(sums_task, options, settings, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    task = failing_at(6, TypeError("a bug"), sums_task(), "step")
    monkeypatch.setattr(TrainState, "save", full)
    with pytest.raises(TypeError, match="a bug"):
        train(options(), task, settings)


@pytest.mark.promise("saved")
def test_a_run_is_saved_before_an_evaluation_which_the_same_call_makes_up_for(sums_task, options, settings):
    accuracies = iter([50.0, None, 40.0, 30.0])

    def evaluate(*_):
        accuracy = next(accuracies)
        if accuracy is None:
            raise TypeError("a bug")
        return Evaluated({"top1": accuracy})

    task, often = sums_task(evaluate=evaluate, metric="top1"), replace(settings, eval_every=2)
    with pytest.raises(TypeError):
        train(options(), task, replace(often, epochs=4))
    assert saved_step(task) == 12
    assert [entry["step"] for entry in read_evaluations(task.out)] == [6]
    result = train(options(), sums_task(evaluate=evaluate, metric="top1"), often)
    assert [(entry["step"], entry["top1"]) for entry in read_evaluations(task.out)] == [(6, 50.0), (12, 40.0)]
    assert (result["top1"], result["best_top1"]) == (40.0, 50.0)
    assert load_checkpoint(task.out / "best.pt")["step"] == 6  # the best of the log is not forgotten
    train(options(), sums_task(evaluate=evaluate, metric="top1"), often)
    assert next(accuracies) == 30.0  # a finished run is not evaluated again


@pytest.mark.promise("kills")
def test_a_picture_that_a_kill_has_cost_is_drawn_by_the_same_call(sums_task, options, settings):
    file, pens = sums_task().out / "confusion.png", iter([KeyboardInterrupt, None])

    def draw():
        if (ended := next(pens)) is not None:
            raise ended
        return b"png"

    def task():
        return sums_task(evaluate=lambda *_: Evaluated({"top1": 1.0}, [Picture(file, draw)]), metric="top1")

    with pytest.raises(KeyboardInterrupt):
        train(options(), task(), settings)
    assert len(read_evaluations(file.parent)) == 1
    train(options(), task(), settings)
    assert file.read_bytes() == b"png"
    assert len(read_evaluations(file.parent)) == 1
    train(options(), task(), settings)  # nothing is left to do
    assert next(pens, "both are used") == "both are used"


@pytest.mark.promise("saved")
@pytest.mark.parametrize("lost", ["drawing", "file"])
def test_a_picture_that_can_not_be_drawn_is_a_warning(lost, sums_task, options, settings, caplog):
    def draw():
        if lost == "drawing":
            raise ValueError("ParseSyntaxException: Expected \\frac")
        return b"png"

    out = sums_task().out
    file = out / "confusion.png"
    if lost == "file":
        file.with_name("run.json").parent.mkdir()
        file.mkdir()
        out.joinpath("run.json").write_text("{}")
    task = sums_task(evaluate=lambda *_: Evaluated({"top1": 1.0}, [Picture(file, draw)]), metric="top1")
    result = train(options(resume=lost == "drawing"), task, settings)
    assert result["top1"] == 1.0
    assert (saved_step(task), load_checkpoint(task.out / "best.pt")["step"]) == (12, 12)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"{file}: can't be drawn (")
    assert "\n" not in warning


@pytest.mark.promise("signals")
@pytest.mark.parametrize("waits_for", ["a batch", "an evaluation"])
def test_a_signal_breaks_off_what_a_run_waits_for_and_everything_is_saved(waits_for, sums_task, options, settings):
    def wait():
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        threading.Event().wait(60)

    def third_batch_never_comes(batches, _):
        for number, batch in enumerate(batches, 1):
            if waits_for == "a batch" and number == 4:
                wait()
            yield batch

    def evaluate(*_):
        if waits_for == "an evaluation":
            wait()
        return Evaluated({"top1": 1.0})

    task = sums_task(wrap_batches=third_batch_never_comes, evaluate=evaluate)
    start = time.monotonic()
    with pytest.raises(InterruptedRunError, match="step 3 is saved; the same call continues"):
        train(options(), task, replace(settings, eval_every=1))
    assert time.monotonic() - start < 10
    assert saved_step(task) == 3


@pytest.mark.promise("signals")
def test_a_signal_before_an_evaluation_leaves_it_to_the_same_call(sums_task, options, settings):
    def evaluate(*_):
        return Evaluated({"top1": 1.0})

    task = sums_task()
    step = task.step

    def signalled(model, batch):
        signal.raise_signal(signal.SIGTERM)
        return step(model, batch)

    last = replace(settings, epochs=1 / 3)
    with pytest.raises(InterruptedRunError, match="stopped after step 1 of 1, and saved"):
        train(options(), replace(task, evaluate=evaluate, step=signalled), last)
    assert read_evaluations(task.out) == []
    train(options(), sums_task(evaluate=evaluate), last)
    assert [entry["step"] for entry in read_evaluations(task.out)] == [1]

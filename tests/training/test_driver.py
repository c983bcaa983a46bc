"""One run from its announcement to its figures: new, interrupted, continued, finished."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from fastmae.errors import InputError, InterruptedRunError
from fastmae.runs.checkpoint import load_checkpoint
from fastmae.runs.folder import read_metrics
from fastmae.runtime.ownership import owned
from fastmae.training.driver import train
from fastmae.training.task import Evaluated


def stopping_after(steps, task):
    """The task, whose step sends SIGTERM to this process after so many steps."""
    calls, step = 0, task.step

    def step_and_stop(model, batch):
        nonlocal calls
        calls += 1
        if calls == steps:
            signal.raise_signal(signal.SIGTERM)
        return step(model, batch)

    return replace(task, step=step_and_stop)


def losses(task):
    return [entry["loss"] for entry in read_metrics(task.out)]


def test_a_run_is_announced_with_its_task_and_its_size(sums_task, options, settings, caplog):
    train(options(micro_batch=2), sums_task(), settings)
    line = caplog.messages[0]
    for part in ("sums of three numbers", "12 images", "4 epochs", "12 steps of 4 in 2 micro-batches", "lr 1.00e-01"):
        assert part in line


def test_a_run_learns_and_its_result_is_that_of_the_last_step(sums_task, options, settings):
    task = sums_task()
    result = train(options(), task, settings)
    assert (result["epochs"], result["steps"], result["loss"]) == (4, 12, losses(task)[-1])
    assert len(losses(task)) == 12
    assert sum(losses(task)[-3:]) < 0.5 * sum(losses(task)[:3])
    assert torch.equal(load_checkpoint(task.out / "checkpoint.pt")["model"]["weight"], task.network.weight)


@pytest.mark.parametrize("log_every", [1, 5])
def test_an_interrupted_run_continues_where_it_stopped_and_reaches_the_same_losses(
    log_every, sums_task, options, settings, tmp_path, caplog
):
    unbroken = sums_task(out=tmp_path / "unbroken")
    train(options(log_every=log_every), unbroken, settings)
    with pytest.raises(InterruptedRunError):
        train(options(log_every=log_every), stopping_after(7, sums_task()), settings)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 7
    caplog.clear()
    continued = sums_task()
    train(options(log_every=log_every), continued, settings)
    assert "from step 7" in caplog.messages[0]
    assert losses(continued) == losses(unbroken)
    assert torch.equal(continued.network.weight, unbroken.network.weight)


def test_determinism_may_be_asked_for_when_a_run_continues_and_ends_with_the_call(
    sums_task, options, settings, tmp_path
):
    unbroken = sums_task(out=tmp_path / "unbroken")
    train(options(), unbroken, settings)
    with pytest.raises(InterruptedRunError):
        train(options(), stopping_after(7, sums_task()), settings)
    asked = []

    def noting(model, batch):
        asked.append(torch.are_deterministic_algorithms_enabled())
        return unbroken.step(model, batch)

    continued = sums_task(step=noting)
    train(options(deterministic=True), continued, settings)
    assert asked == [True] * 5
    assert not torch.are_deterministic_algorithms_enabled()
    assert losses(continued) == losses(unbroken)


def test_a_step_without_a_deterministic_kernel_stops_the_run_with_one_line(sums_task, options, settings):
    def step(model, batch):
        numbers, sums = batch
        doubled = torch.zeros(len(sums)).put_(torch.arange(len(sums)), 2 * sums)
        return sums_task().step(model, (numbers, doubled))

    with pytest.raises(InputError, match=r"--deterministic: .* put_ .*leave --deterministic out$"):
        train(options(deterministic=True), sums_task(step=step), settings)
    train(options(), sums_task(step=step), settings)


def test_a_finished_run_is_not_trained_again(sums_task, options, settings):
    result = train(options(), sums_task(), settings)

    def no_step(*_):
        raise AssertionError("a step was taken")

    assert train(options(), sums_task(step=no_step), settings) == result


def test_only_a_new_run_is_initialised(sums_task, options, settings, caplog):
    def initialise(network):
        torch.nn.init.zeros_(network.weight)
        return "zeros"

    task = stopping_after(1, sums_task(initialise=initialise))
    with pytest.raises(InterruptedRunError):
        train(options(), task, settings)
    assert "begins with zeros" in caplog.messages
    trained = task.network.weight.detach().clone()
    caplog.clear()
    continued = sums_task(initialise=initialise)
    with pytest.raises(InterruptedRunError):
        train(options(), stopping_after(1, continued), settings)
    assert "begins with zeros" not in caplog.messages
    assert not torch.equal(continued.network.weight, trained)
    assert (continued.network.weight != 0).all()


def test_an_initialisation_that_is_refused_leaves_no_folder(sums_task, options, settings):
    def refuse(_):
        raise InputError("--init: another encoder")

    task = sums_task(initialise=refuse)
    with pytest.raises(InputError, match="--init"):
        train(options(), task, settings)
    assert not task.out.exists()


def test_the_run_records_the_options_that_make_it_what_it_is_and_where_its_inputs_are(sums_task, options, settings):
    task = sums_task(description={"classes": ["a", "b"]}, inputs={"data": "/photos"})
    train(options(seed=3), task, settings)
    description = json.loads((task.out / "run.json").read_text())
    assert (description["task"], description["images"], description["classes"]) == ("sums", 12, ["a", "b"])
    recorded = description["options"]
    assert (recorded["seed"], recorded["epochs"], recorded["batch_size"], recorded["lr"]) == (3, 4, 4, 0.1)
    assert not {"device", "workers", "log_every", "out"} & recorded.keys()
    assert json.loads((task.out / "inputs.json").read_text()) == {"data": "/photos"}


def test_a_run_with_other_settings_is_not_continued(sums_task, options, settings):
    train(options(), sums_task(), settings)
    with pytest.raises(InputError, match=r"--lr 0\.1, not 0\.2"):
        train(options(), sums_task(), replace(settings, lr=0.2))


def test_the_result_has_the_last_and_the_best_evaluation(sums_task, options, settings):
    accuracies, weights = iter([10.0, 30.0, 20.0]), []

    def evaluate(network, _):
        weights.append(network.weight.clone())
        return Evaluated({"top1": next(accuracies)})

    task = sums_task(evaluate=evaluate, metric="top1")
    result = train(options(), task, replace(settings, eval_every=1.5))
    assert (result["top1"], result["best_top1"]) == (20.0, 30.0)
    assert result["best_epoch"] == pytest.approx(10 / 3, abs=1e-4)
    best = load_checkpoint(task.out / "best.pt")
    assert (best["step"], best["evaluation"]) == (10, {"top1": 30.0})
    assert torch.equal(best["model"]["weight"], weights[1])


def test_a_finished_run_without_its_logs_is_refused(sums_task, options, settings):
    task = sums_task()
    train(options(), task, settings)
    (task.out / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=str(task.out)):
        train(options(), sums_task(), settings)


@pytest.mark.promise("owner")
@pytest.mark.parametrize("resume", [True, False])
def test_a_run_that_another_process_trains_is_left_as_it_is(resume, sums_task, options, settings):
    train(options(), sums_task(), settings)
    before = {path.name: path.stat().st_mtime_ns for path in sums_task().out.iterdir()}
    refused = pytest.raises(InputError, match=rf"run: in use by process {os.getpid()} on .*\(fastmae finetune\) since")
    with owned(sums_task().out, "finetune"), refused:
        train(options(resume=resume), sums_task(), settings)
    assert {path.name: path.stat().st_mtime_ns for path in sums_task().out.iterdir()} == before


@pytest.mark.promise("owner")
def test_a_run_that_was_taken_over_while_it_was_suspended_stops_and_leaves_the_new_owners_files(
    sums_task, options, settings
):
    task, calls = sums_task(), 0
    lock = task.out / ".owner.lock"

    def step(model, batch):
        nonlocal calls
        calls += 1
        if calls == 3:
            record = json.loads(lock.read_text())
            lock.write_text(json.dumps({**record, "token": 32 * "f", "host": "node7"}))
        return task.step(model, batch)

    with pytest.raises(InputError, match=r"on node7 .* has taken it over"):
        train(options(), replace(task, step=step), settings)
    assert calls == 3
    assert len(losses(task)) == 2
    assert not (task.out / "checkpoint.pt").exists()
    assert json.loads(lock.read_text())["host"] == "node7"


@pytest.mark.promise("files")
def test_a_sound_run_goes_on_after_a_line_of_its_log_that_cannot_be_read(sums_task, options, settings, caplog):
    with pytest.raises(InterruptedRunError):
        train(options(), stopping_after(7, sums_task()), settings)
    log = sums_task().out / "metrics.jsonl"
    log.write_text("nonsense\n" + log.read_text())
    result = train(options(), sums_task(), settings)
    assert len(losses(sums_task())) == result["steps"] == 12
    assert f"{log}: 1 line can't be read" in caplog.text

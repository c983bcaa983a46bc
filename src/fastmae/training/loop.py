"""The training loop. It counts steps, logs, evaluates, saves and stops; what a step computes is the task's."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fastmae.errors import FailedCheckError, InputError, InterruptedRunError
from fastmae.runs.folder import RunFolder
from fastmae.runtime.launch import scales_gradients
from fastmae.runtime.progress import Progress
from fastmae.runtime.seeding import seed_everything
from fastmae.training.evaluation import evaluate, is_due
from fastmae.training.meter import Meter
from fastmae.training.run import Run, train_batches, train_step
from fastmae.training.stopping import StopRequest, Vote


def fit(run: Run, folder: RunFolder) -> None:
    """Train from the state's step to the last one.

    After each step: log every `log_every` steps, evaluate when due, save every `save_every` minutes, stop if a signal
    asks for it.

    Raises:
        InterruptedRunError: after SIGINT, SIGTERM or SIGUSR1, and after saving.
        FailedCheckError: the loss is not a number any more; the last good checkpoint stays.
    """
    config, settings, fabric, state = run.config, run.settings, run.fabric, run.state
    steps, first_process = settings.steps, fabric.is_global_zero
    metrics = folder.metrics(state.step) if first_process else None
    meter, vote = Meter(fabric, state.sums, state.summed_steps), Vote(fabric)
    progress = Progress(
        run.task.name, "steps", steps, state.step, not first_process, scale=settings.batch_size, rate_unit="images"
    )
    seconds_before, start = state.seconds, time.monotonic()
    last_saved = start

    def save() -> None:
        state.sums, state.summed_steps = meter.totals(), meter.summed_steps
        _check_finite(run, state.sums, folder)  # a checkpoint of a run that has failed is worth nothing
        state.save(fabric, folder)

    def save_if_alone() -> None:  # other processes know nothing of this one's failure; they have their regular saves
        if fabric.world_size == 1 and state.step:
            save()

    with StopRequest() as stop, progress, contextlib.closing(metrics) if metrics else contextlib.nullcontext():
        batches = _saved_on_failure(train_batches(run), save_if_alone)
        for first_batch in batches:
            run.schedule.step_update(state.step)
            seed_everything((config.seed * steps + state.step) * fabric.world_size + fabric.global_rank)
            meter.add(
                train_step(run, itertools.chain([first_batch], itertools.islice(batches, run.grad_accum_steps - 1)))
            )
            state.step += 1
            if state.ema is not None:
                state.ema.update(state.network, state.step)
            now = time.monotonic()
            state.seconds = seconds_before + now - start

            if state.step % config.log_every == 0 or state.step == steps:
                entry = _log_entry(run, meter, now)
                _check_finite(run, entry, folder)
                meter.restart(now)
                if metrics is not None:
                    metrics.write(state.step, entry)
                progress.advance(0, loss=f"{entry['loss']:.4f}", lr=f"{entry['lr']:.2e}")
            progress.advance(1)

            if is_due(run):
                seconds = evaluate(run, folder, metrics)
                start += seconds
                meter.pause(seconds)

            must_stop, must_save = vote.after_step(stop.requested, now - last_saved >= 60 * config.save_every)
            if must_stop or must_save or state.step == steps:
                save()
                last_saved = time.monotonic()
            if must_stop and state.step < steps:
                raise InterruptedRunError(
                    f"stopped after step {state.step} of {steps}, and saved; the same call continues"
                )


def _log_entry(run: Run, meter: Meter, now: float) -> dict[str, float]:
    """Means of the scalars, with epoch, learning rate, images per second and seconds."""
    settings, state = run.settings, run.state
    return meter.means() | {
        "epoch": round(settings.epoch_of(state.step), 4),
        "lr": max(group["lr"] for group in state.optimizer.param_groups),  # with layer decay, that of the head
        "images_per_second": round(settings.batch_size * meter.steps_per_second(now), 2),
        "seconds": round(state.seconds, 3),
    }


def _saved_on_failure(batches: Iterable[Any], save: Callable[[], None]) -> Iterator[Any]:
    """The batches; if no more can be had (a damaged store, a lost server), the run is saved first."""
    try:
        yield from batches
    except InputError:
        save()
        raise


def _check_finite(run: Run, scalars: Mapping[str, float], folder: RunFolder) -> None:
    # With scaled gradients, an infinite norm now and then is how the scale is found; such a step is skipped.
    ignored = {"grad_norm"} if scales_gradients(run.fabric) else set()
    bad = next((name for name, value in scalars.items() if name not in ignored and not math.isfinite(value)), None)
    if bad is not None:
        saved = f"{folder.checkpoint} is from before" if folder.checkpoint.exists() else "nothing was saved yet"
        raise FailedCheckError(
            f"{bad} is not a number any more at step {run.state.step}; {saved}; try a lower {run.task.lr_flag}, "
            "--clip-grad 1, or --precision 32-true"
        )

"""The training loop. It counts steps, logs, evaluates, saves and stops; what a step computes is the task's.

Work is saved before anything else can fail: the checkpoint before an evaluation, and the last complete step before any
error leaves the loop.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from fastmae.errors import FailedCheckError, InterruptedRunError, add_note
from fastmae.runs.folder import MetricsLog, RunFolder
from fastmae.runtime.ending import unlimited
from fastmae.runtime.launch import scales_gradients
from fastmae.runtime.progress import Progress
from fastmae.runtime.seeding import seed_everything
from fastmae.training.evaluation import evaluate, is_due, recall
from fastmae.training.meter import Meter
from fastmae.training.run import Run, train_batches, train_step
from fastmae.training.stopping import BreakOff, StopRequest, Vote

SECONDS_FOR_THE_VOTE = 5.0
"""How long one of several processes waits for data after a signal before it leaves without the others' agreement."""


def fit(run: Run, folder: RunFolder) -> None:
    """Train from the state's step to the last one.

    After each step: log every `log_every` steps, save every `save_every` minutes and before an evaluation, evaluate
    when due, stop if a signal asks for it. A run that was stopped before an evaluation begins with it.

    A single process saves its last complete step before an error leaves it. Several have their regular saves, since
    the others know nothing of one's failure.

    Raises:
        InterruptedRunError: after SIGINT, SIGTERM or SIGUSR1, and after saving.
        FailedCheckError: the loss is not a number any more; the last good checkpoint stays.
    """
    metrics = folder.metrics(run.state.step, run.config.loggers) if run.fabric.is_global_zero else None
    patience = 0.0 if run.fabric.world_size == 1 else SECONDS_FOR_THE_VOTE
    with StopRequest(patience) as stop, metrics or contextlib.nullcontext():
        loop = _Loop(run, folder, metrics, stop)
        try:
            loop.train()
        except BreakOff:
            raise InterruptedRunError(f"stopped; {loop.save_what_is_sound()}; the same call continues") from None
        except (InterruptedRunError, FailedCheckError):
            raise
        except Exception as error:
            if run.state.step:
                add_note(error, loop.save_what_is_sound())
            raise


class _Loop:
    """The steps of one call.

    Args:
        run: the run, restored.
        folder: its folder.
        metrics: its logs, in the first process.
        stop: whether a signal has come.
    """

    def __init__(self, run: Run, folder: RunFolder, metrics: MetricsLog | None, stop: StopRequest):
        self.run, self.folder, self.metrics, self.stop = run, folder, metrics, stop
        self.meter = Meter(run.fabric, run.state.sums, run.state.summed_steps)
        self.saved_step = run.state.step
        self.progress: Progress | None = None
        self.start = self.last_saved = time.monotonic()

    def train(self) -> None:
        """Take the steps that are left."""
        run, state, stop = self.run, self.run.state, self.stop
        config, settings, fabric = run.config, run.settings, run.fabric
        steps, vote, seconds_before = settings.steps, Vote(fabric), state.seconds
        progress = Progress(
            *(run.task.name, "steps", steps, state.step, not fabric.is_global_zero),
            scale=settings.batch_size,
            rate_unit="images",
        )
        with progress:
            self.progress = progress
            if not recall(run, self.folder):
                self._evaluate()
            batches = self._waited_for(train_batches(run))
            for first_batch in batches:
                with unlimited():
                    run.schedule.step_update(state.step)
                    seed_everything((config.seed * steps + state.step) * fabric.world_size + fabric.global_rank)
                    others = itertools.islice(batches, run.grad_accum_steps - 1)
                    self.meter.add(train_step(run, itertools.chain([first_batch], others)))
                    state.count_step()
                    now = time.monotonic()
                    state.seconds = seconds_before + now - self.start
                    if state.step % config.log_every == 0 or state.step == steps:
                        self._log(now, progress)
                    progress.advance(1)
                    is_over = now - self.last_saved >= 60 * config.save_every
                    must_stop, must_save = vote.after_step(stop.requested, is_over)
                    if must_stop or must_save or is_due(run) or state.step == steps:
                        self._save()
                if must_stop and (state.step < steps or is_due(run)):
                    raise InterruptedRunError(
                        f"stopped after step {state.step} of {steps}, and saved; the same call continues"
                    )
                if is_due(run):
                    self._evaluate()

    def save_what_is_sound(self) -> str:
        """Before the end that nobody wanted: save the last complete step, if it can be; returns what is saved."""
        state = self.run.state
        if self.saved_step < state.step and state.sound and self.run.fabric.world_size == 1:
            with contextlib.suppress(Exception), unlimited():  # what has ended the run matters, not why this fails too
                self._save()
        return f"step {self.saved_step} is saved" if self.saved_step else "nothing is saved yet"

    def _waited_for(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches. A signal breaks off the wait for one: between them, the state is that of a complete step."""
        while True:
            with self.stop.breaks_off():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    def _log(self, now: float, progress: Progress) -> None:
        entry = _log_entry(self.run, self.meter, now)
        _check_finite(self.run, entry, self.folder)
        self.meter.restart(now)
        if self.metrics is not None:
            self.metrics.write(self.run.state.step, entry)
        progress.advance(0, loss=f"{entry['loss']:.4f}", lr=f"{entry['lr']:.2e}")

    def _save(self) -> None:
        state = self.run.state
        state.sums, state.summed_steps = self.meter.totals(), self.meter.summed_steps
        _check_finite(self.run, state.sums, self.folder)  # a checkpoint of a run that has failed is worth nothing
        state.save(self.run.fabric, self.folder)
        self.saved_step, self.last_saved = state.step, time.monotonic()

    def _evaluate(self) -> None:
        """A signal breaks it off: everything is saved."""
        assert self.progress is not None
        self.progress.now("evaluating")
        with self.stop.breaks_off(at_once=True):
            seconds = evaluate(self.run, self.folder, self.metrics)
        self.progress.now("")
        self.start += seconds
        self.meter.pause(seconds)


def _log_entry(run: Run, meter: Meter, now: float) -> dict[str, float]:
    """Means of the scalars, with epoch, learning rate, images per second and seconds."""
    settings, state = run.settings, run.state
    return meter.means() | {
        "epoch": round(settings.epoch_of(state.step), 4),
        "lr": max(group["lr"] for group in state.optimizer.param_groups),  # with layer decay, that of the head
        "images_per_second": round(settings.batch_size * meter.steps_per_second(now), 2),
        "seconds": round(state.seconds, 3),
    }


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

"""The training loop: one for every task. It counts steps, saves, logs and stops; what a step computes is the task's."""

import contextlib
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.distributed.tensor import DTensor

from fastmae.errors import FailedCheckError, InputError, InterruptedRunError
from fastmae.runs.folder import RunFolder
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import scales_gradients
from fastmae.runtime.progress import Progress
from fastmae.training.evaluation import Evaluation
from fastmae.training.state import TrainState
from fastmae.training.stopping import Agreement, StopRequest

StepFunction = Callable[[nn.Module, Any], Mapping[str, torch.Tensor]]
"""(model, batch) -> scalars to log; 'loss' is the one that is minimised."""


def fit(
    fabric: Fabric,
    state: TrainState,
    schedule: Scheduler,
    loader: Iterable[Any],
    step_function: StepFunction,
    folder: RunFolder,
    *,
    what: str,
    steps: int,
    steps_per_epoch: float,
    batch_size: int,
    seed: int,
    clip_grad: float,
    save_every: float,
    log_every: int,
    parts: int = 1,
    evaluation: Evaluation | None = None,
) -> dict[str, float]:
    """Train from `state.step` to `steps`, saving and logging on the way.

    Args:
        fabric: launched.
        state: restored.
        schedule: of the learning rate, by step.
        loader: gives `parts` batches a step, from `state.step` on, on the device.
        step_function: computes a step's scalars.
        folder: of the run.
        what: the command's name, for progress.
        steps: in the whole run.
        steps_per_epoch: for the log.
        batch_size: views a step over all processes.
        seed: of what is drawn inside the model.
        clip_grad: largest gradient norm, 0 for none.
        save_every: minutes between checkpoints.
        log_every: steps between log entries.
        parts: batches of equal size whose gradients are accumulated to a step.
        evaluation: what is measured on the way.

    Returns:
        The last log entry.

    Raises:
        InterruptedRunError: on SIGINT, SIGTERM or SIGUSR1, after saving.
        FailedCheckError: the loss is no longer a number; the last good checkpoint stays.
    """
    log = folder.metrics(state.step) if fabric.is_global_zero else None
    last_saved = last_logged = begun = time.monotonic()
    last_logged_step = state.step
    seconds_before = state.seconds
    sums = {name: torch.tensor(value, device=fabric.device) for name, value in state.sums.items()}
    entry: dict[str, float] = {}
    state.model.train()
    agreement = Agreement(fabric)
    progress = Progress(
        what, "steps", steps, state.step, not fabric.is_global_zero, scale=batch_size, rate_unit="images"
    )
    with StopRequest() as stop, progress, contextlib.closing(log) if log else contextlib.nullcontext():

        def save_alone() -> None:
            if (
                fabric.world_size == 1 and state.step
            ):  # of several processes the others don't know; they have their regular saves
                state.sums = _mean_over_processes(fabric, sums, 1) if sums else {}
                state.save(fabric, folder)

        batches = _saved_on_failure(loader, save_alone)
        for first in batches:
            schedule.step_update(state.step)
            _seed_generators((seed * steps + state.step) * fabric.world_size + fabric.global_rank)
            parts_of_step = itertools.chain([first], itertools.islice(batches, parts - 1))
            scalars = _take_step(fabric, state, parts_of_step, parts, step_function, clip_grad)
            state.step += 1
            if state.ema is not None:
                state.ema.update(state.network, state.step)
            for name, value in scalars.items():
                sums[name] = sums[name] + value if name in sums else value

            now = time.monotonic()
            state.seconds = seconds_before + now - begun
            if state.step % log_every == 0 or state.step == steps:
                count = (state.step - 1) % log_every + 1
                entry = _mean_over_processes(fabric, sums, count)
                _check_finite(fabric, entry, state.step, folder)
                entry |= {
                    "epoch": round(_epoch(state.step, steps, steps_per_epoch), 4),
                    "lr": max(group["lr"] for group in state.optimizer.param_groups),  # of the head, where layers decay
                    "images_per_second": round(batch_size * (state.step - last_logged_step) / (now - last_logged), 2),
                    "seconds": round(state.seconds, 3),
                }
                sums, last_logged, last_logged_step = {}, now, state.step
                if log is not None:
                    log.write(state.step, entry)
                progress.advance(0, loss=f"{entry['loss']:.4f}", lr=f"{entry['lr']:.2e}")
            progress.advance(1)

            if evaluation is not None and evaluation.due(state.step, steps):
                pause = evaluation.run(fabric, state, folder, log, _epoch(state.step, steps, steps_per_epoch))
                begun, last_logged = begun + pause, last_logged + pause

            must_stop, must_save = agreement.on(stop.requested, now - last_saved >= 60 * save_every)
            if must_stop or must_save or state.step == steps:
                state.sums = _mean_over_processes(fabric, sums, 1) if sums else {}
                _check_finite(fabric, state.sums, state.step, folder)
                state.save(fabric, folder)
                last_saved = time.monotonic()
            if must_stop and state.step < steps:
                raise InterruptedRunError(
                    f"stopped after step {state.step} of {steps}, and saved; the same call continues"
                )
    return entry


def _epoch(step: int, steps: int, steps_per_epoch: float) -> float:
    """Epochs done; a last step that goes over the end of the last epoch does not count for more."""
    asked = math.floor(steps / steps_per_epoch) if steps_per_epoch >= 1 else math.inf
    return min(step / steps_per_epoch, asked)


def _take_step(
    fabric: Fabric, state: TrainState, batches: Iterable[Any], parts: int, step_function: StepFunction, clip_grad: float
) -> dict[str, torch.Tensor]:
    """One step of the optimizer over the gradients of its batches; the step's scalars, averaged over them, and `grad_norm`."""
    scalars: dict[str, torch.Tensor] = {}
    for part, batch in enumerate(batches, 1):
        with fabric.no_backward_sync(state.model, enabled=fabric.world_size > 1 and part < parts):
            found = step_function(state.model, batch)
            fabric.backward(found["loss"] / parts)
        for name, value in found.items():
            scalars[name] = scalars.get(name, 0.0) + value.detach() / parts
    norm = _clip(fabric, state, clip_grad)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return {**scalars, "grad_norm": norm}


def _seed_generators(seed: int) -> None:
    """What is drawn in a step: masks and drop path by torch, mixing of images by NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _saved_on_failure(loader: Iterable[Any], save: Callable[[], None]) -> Iterator[Any]:
    """The loader's batches; where it has none to give any more (a damaged store, a lost server), what was trained is saved first."""
    try:
        yield from loader
    except InputError:
        save()
        raise


def _clip(fabric: Fabric, state: TrainState, clip_grad: float) -> torch.Tensor:
    """Clip where asked; the gradient's norm in any case, for the log."""
    largest = clip_grad if clip_grad > 0 else math.inf
    norm: Any = fabric.clip_gradients(state.model, state.optimizer, max_norm=largest, error_if_nonfinite=False)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _mean_over_processes(fabric: Fabric, sums: Mapping[str, torch.Tensor], count: int) -> dict[str, float]:
    means = torch.stack([value.float() for value in sums.values()]) / count
    reduced: Any = fabric.all_reduce(means, reduce_op="mean")
    return dict(zip(sums, reduced.tolist(), strict=True))


def _check_finite(fabric: Fabric, values: Mapping[str, float], step: int, folder: RunFolder) -> None:
    # With scaled gradients an infinite norm now and then is how the scale is found; such a step is not taken.
    skipped = {"grad_norm"} if scales_gradients(fabric) else set()
    bad = next((name for name, value in values.items() if name not in skipped and not math.isfinite(value)), None)
    if bad is not None:
        kept = f"{folder.checkpoint} is from before it" if folder.checkpoint.exists() else "nothing was saved yet"
        raise FailedCheckError(
            f"{bad} is no longer a number at step {step}; {kept}; try a lower --base-lr, --clip-grad 1, or --precision 32-true"
        )

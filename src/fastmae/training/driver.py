"""The training driver: the one sequence by which pretrain, finetune, linear, segment and detect train."""

import contextlib
import logging
import math
from pathlib import Path
from typing import Any

from fastmae.config import TrainingConfig
from fastmae.errors import InputError
from fastmae.runs.folder import CHECKPOINT_FILE, INPUTS_FILE, RUN_FILE, RunFolder, read_evaluations, read_metrics
from fastmae.runs.loggers import check_installed
from fastmae.runtime.arithmetic import computes_as_asked
from fastmae.runtime.device import memory_hint
from fastmae.runtime.durable import write_json
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import on_first_process
from fastmae.runtime.ownership import owned
from fastmae.runtime.peers import ends_with_its_peers
from fastmae.runtime.wording import counted
from fastmae.training.loop import fit
from fastmae.training.run import Run, launch_processes, set_up
from fastmae.training.task import Settings, Task

log = logging.getLogger(__name__)


@ends_with_its_peers
@computes_as_asked
def train(config: TrainingConfig, task: Task, settings: Settings) -> dict[str, Any] | None:
    """Train a run to its end, or continue it.

    The sequence: launch the processes; own the folder, by the first one; initialise a new run; open its folder; put
    network, optimizer and schedule on the device; restore the checkpoint; announce the run; train.

    Returns:
        What all training commands' JSON has in common, with the figures of the last evaluation. None in all processes
        but the first.

    Raises:
        InputError: a folder that holds another run or that another process trains in, a batch that can't be divided
            among the processes, or a logger whose package is missing.
    """
    check_installed(config.loggers)
    fabric, grad_accum_steps = launch_processes(config, task, settings)
    with contextlib.ExitStack() as stack:
        on_first_process(fabric, lambda: stack.enter_context(owned(task.out, task.name)))
        return _train_owned(config, task, settings, fabric, grad_accum_steps)


def _train_owned(
    config: TrainingConfig, task: Task, settings: Settings, fabric: Fabric, grad_accum_steps: int
) -> dict[str, Any] | None:
    """Train in a folder that is this run's own."""
    stopped = config.resume and (task.out / RUN_FILE).exists()
    begun = config.resume and (task.out / CHECKPOINT_FILE).exists()
    initialised_with = "" if begun else task.initialise(task.network)  # may refuse; so before anything is written
    folder = _open_folder(config, task, settings, fabric)
    run = set_up(config, task, settings, fabric, grad_accum_steps)
    run.state.restore(fabric, folder)
    if fabric.is_global_zero:
        log.info(_announcement(run))
        if stopped and not begun:
            log.info("no checkpoint yet: starting at step 0; --save-every takes minutes between checkpoints")
        if initialised_with:
            log.info(f"begins with {initialised_with}")
    smaller = f"--micro-batch {max(1, run.device_batch_size // 2)} (now {run.device_batch_size})"
    with memory_hint(f"give {smaller}, and the same call continues"):
        fit(run, folder)
    return _outcome(folder, task, settings) if fabric.is_global_zero else None


def _open_folder(config: TrainingConfig, task: Task, settings: Settings, fabric: Fabric) -> RunFolder:
    """The run's folder: made, or checked against the run that it holds, by the first process."""
    description = {
        "fastmae run": 1,
        "task": task.name,
        "images": settings.images,
        "options": _options(config, settings),
        **task.description,
    }

    def prepare() -> None:
        RunFolder(task.out, description, config.resume)
        if task.inputs:
            write_json(task.out / INPUTS_FILE, task.inputs)

    on_first_process(fabric, prepare)
    return RunFolder(task.out, description, resume=True)


def _options(config: TrainingConfig, settings: Settings) -> dict[str, Any]:
    """The options that make the run what it is; those that were left open, as the recipe has set them."""
    options = {name: value for name, value in vars(config).items() if name not in config.may_change}
    settled = {name: value for name, value in vars(settings).items() if name in options}
    settled |= {name: None for name, value in settled.items() if value == math.inf}  # JSON has no infinity
    return {name: str(value) if isinstance(value, Path) else value for name, value in (options | settled).items()}


def _announcement(run: Run) -> str:
    settings, fabric, step = run.settings, run.fabric, run.state.step
    accumulated = f" in {run.grad_accum_steps} micro-batches" if run.grad_accum_steps > 1 else ""
    begins = ", all done before" if step == settings.steps else f", from step {step}" if step else ""
    evaluated = f"; evaluated every {counted(settings.eval_every, 'epoch')}" if run.task.evaluate is not None else ""
    size = f"{counted(settings.epochs, 'epoch')} = {counted(settings.steps, 'step')} of {settings.batch_size}"
    return (
        f"{run.task.headline}; {counted(settings.images, 'image')}, {size}{accumulated}{begins}; lr {settings.lr:.2e}, "
        f"warm-up {counted(settings.warmup_steps, 'step')}{evaluated}; {fabric.world_size} x {fabric.device.type}"
    )


def _outcome(folder: RunFolder, task: Task, settings: Settings) -> dict[str, Any]:
    entries = read_metrics(folder.path)
    evaluations = [entry for entry in read_evaluations(folder.path) if task.metric in entry]
    if not entries or (task.metric and not evaluations):
        raise InputError(f"{folder.path}: the run is finished, but its logs are gone; --no-resume trains it again")
    last = entries[-1]
    outcome = {
        "epochs": settings.epochs,
        "steps": settings.steps,
        "loss": last["loss"],
        "seconds": last["seconds"],
        "images_per_second": last["images_per_second"],
        "checkpoint": str(folder.checkpoint),
    }
    if not task.metric:
        return outcome
    figures = {name: value for name, value in evaluations[-1].items() if name not in ("step", "epoch", "seconds")}
    best = max(evaluations, key=lambda entry: entry[task.metric] if entry[task.metric] is not None else -math.inf)
    best_figures = {f"best_{task.metric}": best[task.metric], "best_epoch": best["epoch"], "best": str(folder.best)}
    return {**figures, **best_figures, **outcome}

"""Evaluations while a run trains: their figures are logged, and the best weights are kept."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from fastmae.runs.checkpoint import write_checkpoint
from fastmae.runs.folder import MetricsLog, RunFolder
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import on_first_process
from fastmae.runtime.workers import batches
from fastmae.training.run import Run

log = logging.getLogger(__name__)
SHOWN = 4
"""Number of figures shown after an evaluation; all of them are logged."""


def val_batches(
    dataset: Dataset[Any],
    fabric: Fabric,
    batch_size: int,
    workers: int,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Iterator[Any]:
    """Batches of this process's share of val/, in order, on its device. Each image is in exactly one process's share.

    Args:
        dataset: the images of val/.
        fabric: of the run.
        batch_size: images per batch.
        workers: loading processes, as `--workers`.
        collate: samples -> batch; None: torch's own.
    """
    share = Subset(dataset, range(fabric.global_rank, len(dataset), fabric.world_size))  # type: ignore[arg-type]
    loaded = batches(share, fabric.device, workers, batch_size=batch_size, collate=collate)
    return map(fabric.to_device, loaded)


def is_due(run: Run) -> bool:
    """Whether to evaluate after the step that has just been done."""
    settings, step = run.settings, run.state.step
    if run.task.evaluate is None:
        return False
    if step == settings.steps:
        return True
    interval = settings.eval_every * settings.images / settings.batch_size
    return math.isfinite(interval) and step % math.ceil(interval) == 0


def evaluate(run: Run, folder: RunFolder, metrics: MetricsLog | None) -> float:
    """Evaluate, log the figures, and keep the weights if they are the best so far.

    The task's `evaluate` gets the bare network (or its moving average) in evaluation mode, without gradients and under
    the run's precision.

    Returns:
        The seconds it took. They don't count as training.
    """
    fabric, task, state = run.fabric, run.task, run.state
    assert task.evaluate is not None
    start = time.monotonic()
    network = state.evaluated_network
    network.eval()
    with torch.no_grad(), fabric.autocast():
        figures = dict(task.evaluate(network, fabric))
    state.model.train()
    if metrics is not None:
        epoch = run.settings.epoch_of(state.step)
        names = task.shown or tuple(itertools.islice(figures, SHOWN))
        shown = ", ".join(f"{name} {figures[name]:g}" for name in names if name in figures)
        log.info(f"epoch {epoch:.4g} (step {state.step}): {shown}")
        entry = {"epoch": round(epoch, 4), "seconds": round(state.seconds, 3), **figures}
        metrics.write_evaluation(state.step, entry)
    if task.metric and figures[task.metric] > state.best:
        state.best = figures[task.metric]
        checkpoint = {
            "model": network.state_dict(),
            "run": folder.description,
            "step": state.step,
            "evaluation": figures,
        }
        on_first_process(fabric, lambda: write_checkpoint(folder.best, checkpoint))
    return time.monotonic() - start

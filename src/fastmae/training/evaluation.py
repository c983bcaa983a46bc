"""Evaluations while a run trains: their figures are logged, and the best weights are kept."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from fastmae.errors import first_line
from fastmae.runs.checkpoint import write_checkpoint
from fastmae.runs.folder import MetricsLog, RunFolder, read_evaluations
from fastmae.runtime.durable import write_whole
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import on_first_process
from fastmae.runtime.progress import counted_through
from fastmae.runtime.workers import batches
from fastmae.training.run import Run
from fastmae.training.task import Picture

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
    count, quiet = -(-len(share) // batch_size), not fabric.is_global_zero
    return map(fabric.to_device, counted_through(loaded, "evaluate", "batches", count, quiet))


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
    """Evaluate, keep the weights if they are the best so far, log the figures, and draw the pictures, in this order.

    So an evaluation whose figures are in the log lacks at most its pictures, and a file says so until they are drawn. A
    picture that can't be drawn is a warning.

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
        evaluated = task.evaluate(network, fabric)
    figures = dict(evaluated.figures)
    state.model.train()
    if task.metric and figures[task.metric] > state.best:
        checkpoint = {
            "model": network.state_dict(),
            "run": folder.description,
            "step": state.step,
            "evaluation": figures,
        }
        on_first_process(fabric, lambda: write_checkpoint(folder.best, checkpoint))
        state.best = figures[task.metric]
    if metrics is not None:
        epoch = run.settings.epoch_of(state.step)
        names = task.shown or tuple(itertools.islice(figures, SHOWN))
        shown = ", ".join(f"{name} {figures[name]:g}" for name in names if name in figures)
        log.info(f"epoch {epoch:.4g} (step {state.step}): {shown}")
        entry = {"epoch": round(epoch, 4), "seconds": round(state.seconds, 3), **figures}
        if evaluated.pictures:
            folder.pictures_due.touch()
        if not _is_logged(folder, state.step):
            metrics.write_evaluation(state.step, entry)
        for picture in evaluated.pictures:
            _draw(picture, state.step, metrics)
        folder.pictures_due.unlink(missing_ok=True)
    return time.monotonic() - start


def recall(run: Run, folder: RunFolder) -> bool:
    """Take up what the run's log says of its evaluations, the best figure among them.

    The checkpoint was written before the evaluation at its step, which an interruption or a failure may have cost.

    Returns:
        Whether the evaluation at the state's step is complete, or is not due. The same in every process.
    """
    task, state = run.task, run.state
    if task.evaluate is None or not state.step:
        return True
    complete, best = False, state.best
    if run.fabric.is_global_zero:
        entries = [entry for entry in read_evaluations(folder.path) if entry["step"] <= state.step]
        is_done = _is_logged(folder, state.step) and not folder.pictures_due.exists()
        complete = is_done or not is_due(run)
        logged = [entry.get(task.metric) for entry in entries]
        best = max([best, *(value for value in logged if isinstance(value, int | float))])
    complete, state.best = run.fabric.broadcast((complete, best))
    return complete


def _is_logged(folder: RunFolder, step: int) -> bool:
    return any(entry["step"] == step for entry in read_evaluations(folder.path))


def _draw(picture: Picture, step: int, metrics: MetricsLog) -> None:
    try:
        png = picture.png()
        write_whole(picture.file, lambda part: part.write_bytes(png))
        metrics.picture(step, picture.file.stem, png)
    except Exception as error:  # names and photos are strangers'; nothing about them is worth a run
        cause = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        log.warning(f"{picture.file}: can't be drawn ({cause}); the run goes on without this picture")

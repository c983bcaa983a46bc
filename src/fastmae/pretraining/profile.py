"""`pretrain --profile`: where the time of a step goes, and what to change. Nothing is trained or written."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastmae.config import PretrainConfig
from fastmae.errors import InputError
from fastmae.pretraining.plan import Plan
from fastmae.pretraining.step import PretrainStep
from fastmae.runtime.arithmetic import computes_as_asked
from fastmae.runtime.device import synchronise
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import bare
from fastmae.runtime.progress import counted_through
from fastmae.runtime.wording import counted
from fastmae.runtime.workers import worker_count
from fastmae.student.encoder import EncodedLayers
from fastmae.student.loss import Prediction
from fastmae.student.student import AnyStudent
from fastmae.tokens.loader import ViewBatch
from fastmae.training.run import launch_processes, loader, sampler, set_up
from fastmae.training.task import Task

log = logging.getLogger(__name__)
TIMED_STEPS, WARMUP_STEPS = 50, 5
"""The first steps are not timed: they allocate memory and start the loading processes."""
STAGES = {
    "loader": "waiting for views",
    "copy": "moving the batch to the device",
    "target": "normalising the targets (and an online teacher's forward pass)",
    "encoder": "forward and backward, visible patches only",
    "decoder": "forward and backward, with the layers' heads",
    "loss": "both losses, forward and backward",
    "optimiser": "the optimizer's step",
}
ADVICE_THRESHOLD = 0.15
"""Share of a step from which advice is about the loader, the copy or the optimizer."""


class StageClock:
    """Adds up seconds by stage. On a GPU it waits until the work is done.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time within the context for a stage."""
        synchronise(self.device)
        start = time.perf_counter()
        yield
        synchronise(self.device)
        self.seconds[name] += time.perf_counter() - start


@computes_as_asked
def profile(config: PretrainConfig, plan: Plan, task: Task, timed_steps: int = TIMED_STEPS) -> dict[str, Any]:
    """Time the stages of steps of a student that is thrown away.

    Args:
        config: the run's options.
        plan: the run's plan.
        task: the run's task.
        timed_steps: number of steps to time.

    Returns:
        The command's JSON: `steps`, `seconds` per step, `images_per_second`, `shares` by stage, `advice`.

    Raises:
        InputError: several processes.
    """
    fabric, grad_accum_steps = launch_processes(config, task, plan.settings)
    if fabric.world_size > 1:
        raise InputError("--profile: times a single process; give --devices 1")
    run = set_up(config, task, plan.settings, fabric, grad_accum_steps)
    timed_steps = min(timed_steps, max(1, plan.settings.steps - WARMUP_STEPS))
    warmup_steps = min(WARMUP_STEPS, plan.settings.steps - timed_steps)
    step_sampler = sampler(run)
    batches = task.wrap_batches(loader(run, step_sampler), step_sampler)
    optimizer = bare(run.state.optimizer)  # the gradients are not scaled here, and Fabric's would unscale them
    clock, start = StageClock(fabric.device), time.perf_counter()
    steps = warmup_steps + timed_steps
    for step in counted_through(range(steps), "profile", "steps", steps):
        if step == warmup_steps:
            clock, start = StageClock(fabric.device), time.perf_counter()
        for _ in range(grad_accum_steps):
            with clock.stage("loader"):
                batch = next(batches)
            with clock.stage("copy"):
                batch = fabric.to_device(batch)
            # A pre-training task has a student and a PretrainStep, which its general type doesn't say.
            forward_and_backward(run.state.network, task.step, batch, fabric, clock)  # type: ignore[arg-type]
        with clock.stage("optimiser"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return _outcome(config, clock, (time.perf_counter() - start) / timed_steps, timed_steps)


def forward_and_backward(
    student: AnyStudent, step: PretrainStep, batch: ViewBatch, fabric: Fabric, clock: StageClock
) -> None:
    """The gradients of a batch, computed in stages that are timed one by one.

    The graph is cut where the encoder's layers leave it and where the predictions enter the loss. Forward: encoder,
    decoder, target, loss. Backward through the loss, then through decoder and heads, then through the encoder; at each
    cut, the gradients that arrived there are handed on.
    """
    with clock.stage("encoder"), fabric.autocast():
        encoded = student.encode_tokens(batch.pixels, batch.ids_shuffle[:, : student.visible], step.pixel_scale)
        layers = [*encoded.tokens, *encoded.normed]
    layer_leaves = [layer.detach().requires_grad_() for layer in layers]
    depth = len(encoded.tokens)
    with clock.stage("decoder"), fabric.autocast():
        prediction = student.predict(EncodedLayers(layer_leaves[:depth], layer_leaves[depth:]), batch.ids_shuffle)
        by_kind = (prediction.decoded, prediction.heads, *prediction.features)
        predictions = [predicted for predicted in by_kind if predicted is not None]
    with clock.stage("target"):
        target = step.targets(batch)
    prediction_leaves = [tensor.detach().requires_grad_() for tensor in predictions]
    with clock.stage("loss"):
        leaves = iter(prediction_leaves)
        cut = Prediction(
            decoded=None if prediction.decoded is None else next(leaves),
            heads=None if prediction.heads is None else next(leaves),
            prefix=prediction.prefix,
            features=[next(leaves) for _ in prediction.features],
        )
        step.loss(cut, target)["loss"].backward()
    with clock.stage("decoder"):
        torch.autograd.backward(predictions, [leaf.grad for leaf in prediction_leaves])
    with clock.stage("encoder"):
        reached = [pair for pair in zip(layers, layer_leaves, strict=True) if pair[1].grad is not None]
        torch.autograd.backward([tensor for tensor, _ in reached], [leaf.grad for _, leaf in reached])


def _outcome(config: PretrainConfig, clock: StageClock, seconds: float, steps: int) -> dict[str, Any]:
    total = sum(clock.seconds.values())
    shares = {stage: spent / total for stage, spent in clock.seconds.items()}
    advice = advise(shares, config)
    rate = config.batch_size / seconds
    log.info(
        f"{counted(steps, 'step')} of {counted(config.batch_size, 'view')}, {seconds:.3f} s each: {rate:.1f} images/s"
    )
    for stage, share in shares.items():
        log.info(f"  {stage:10} {100 * share:5.1f} %  {'#' * round(40 * share):40}  {STAGES[stage]}")
    log.info(advice)
    return {
        "steps": steps,
        "seconds": seconds,
        "images_per_second": rate,
        "shares": {stage: round(share, 4) for stage, share in shares.items()},
        "advice": advice,
    }


def advise(shares: dict[str, float], config: PretrainConfig) -> str:
    """What to change first, in a sentence.

    Args:
        shares: stage -> its share of a step.
        config: the run's options.
    """

    def percent(stage: str, name: str = "") -> str:
        return f"the {name or stage} takes {100 * shares[stage]:.0f} % of a step"

    workers = worker_count(config.workers)
    if shares["loader"] > ADVICE_THRESHOLD:
        more = f"--workers {workers + 4} (now {workers})"
        return f"{percent('loader')}: give {more} if there are cores for them, or tokenize with --pixels raw"
    if config.target == "teacher" and shares["target"] > ADVICE_THRESHOLD:
        return f"{percent('target', 'online teacher')}: --target tokens reads the same features from the store"
    if shares["copy"] > ADVICE_THRESHOLD:
        return f"{percent('copy')}: the bus is slow or the tokens are wide; tokenize with --codec pq48"
    if shares["optimiser"] > ADVICE_THRESHOLD:
        return f"{percent('optimiser')}: with a larger --batch-size there are fewer steps"
    if shares["decoder"] > shares["encoder"]:
        return f"{percent('decoder')}: give --decoder-depth 1 or a smaller --decoder-width"
    return (
        f"{percent('encoder')}, where the time should go; on a GPU, --precision bf16-mixed or --compile is faster, and "
        "so are more devices"
    )

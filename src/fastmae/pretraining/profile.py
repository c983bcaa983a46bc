"""`pretrain --profile`: where a step's time goes, and what to change. Nothing is trained or written."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastmae.config import PretrainConfig
from fastmae.errors import InputError
from fastmae.images.views import normalise
from fastmae.pretraining.plan import Plan, loss_weights, plan
from fastmae.pretraining.step import launch_for, optimizer_for, view_loader
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.workers import worker_count
from fastmae.student.loss import Prediction, StudentLoss
from fastmae.student.student import Student, build_student
from fastmae.student.targets import OnlineTokens
from fastmae.tokens.loader import ViewBatch
from fastmae.training.task import micro_batches

STEPS, FIRST = 50, 5
"""Steps that are timed, and those before them, which also allocate and start the loading processes."""
PARTS = ("loader", "copy", "target", "encoder", "decoder", "loss", "optimiser")
PART_WORDS = {
    "loader": "waiting for views",
    "copy": "to the device",
    "target": "normalising what is predicted (an online teacher's forward)",
    "encoder": "forward and backward, of the visible patches",
    "decoder": "forward and backward, with the layers' heads",
    "loss": "both losses, forward and backward",
    "optimiser": "the step",
}
LOUD = 0.15
"""Share of a step from which the loader, the copy or the optimiser is worth a word."""


class Clock:
    """Adds up seconds by part; on a GPU it waits for the work to be done."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """What happens within counts for a part."""
        self._wait()
        begun = time.perf_counter()
        yield
        self._wait()
        self.seconds[part] += time.perf_counter() - begun

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def profile(config: PretrainConfig, timed_steps: int = STEPS) -> dict[str, Any]:
    """Time steps of a student that is thrown away, part by part.

    The gradient takes the way it always takes, in two stages, cut where the encoder's layers leave it: so the encoder's and the decoder's
    shares are told apart.

    Args:
        config: of the run that is asked about.
        timed_steps: how many.

    Returns:
        The command's JSON: `steps`, `seconds` a step, `images_per_second`, `shares` by part, `advice`.

    Raises:
        InputError: several processes.
    """
    made, fabric = plan(config), launch_for(config)
    if fabric.world_size > 1:
        raise InputError("--profile: times one process; give --devices 1")
    parts = micro_batches(config.batch_size, config.micro_batch)
    student = build_student(config, made.patch_size, made.target_dim, made.channels).to(fabric.device)
    optimizer = optimizer_for(config, student, fabric)
    batches = iter(view_loader(config, made, 0, fabric, parts, move=False))
    clock, begun = Clock(fabric.device), 0.0
    done = min(timed_steps, max(1, made.steps - FIRST))
    take = _step_of(config, made, fabric, student)
    for step in range(min(FIRST, made.steps - done) + done):
        if step == min(FIRST, made.steps - done):
            clock, begun = Clock(fabric.device), time.perf_counter()
        for _ in range(parts):
            with clock.of("loader"):
                batch = next(batches)
            with clock.of("copy"):
                batch = batch.to(fabric.device)
            take(batch, clock)
        with clock.of("optimiser"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return _told(config, clock, (time.perf_counter() - begun) / done, done)


def _step_of(
    config: PretrainConfig, made: Plan, fabric: Fabric, student: Student
) -> Callable[[ViewBatch, Clock], None]:
    loss_of = StudentLoss(
        config.loss, config.all_layers_weight, made.target.dims, loss_weights(config, len(made.target.dims))
    )
    mean, std = made.stores[0][-1].normalisation
    if isinstance(made.target, OnlineTokens):
        made.target.to(fabric.device)

    def take(batch: ViewBatch, clock: Clock) -> None:
        with clock.of("encoder"), fabric.autocast():
            images = normalise(batch.pixels, mean, std)
            prefix, layers = student.encode_with_prefix(images, batch.ids_shuffle[:, : student.visible])
        cut_prefix, *cut = (part.detach().requires_grad_() for part in (prefix, *layers))
        with clock.of("decoder"), fabric.autocast():
            by_layer = (
                [head(layer) for head, layer in zip(student.layer_heads, cut, strict=True)]
                if student.layer_heads
                else []
            )
            outputs = [student.decode(cut, batch.ids_shuffle, cut_prefix if student.decoder_prefix else None), *by_layer]
        with clock.of("target"):
            target = made.target(batch, images)
        leaves = [output.detach().requires_grad_() for output in outputs]
        with clock.of("loss"):
            loss_of(Prediction(leaves[0], leaves[1:]), target, batch.ids_shuffle)["loss"].backward()
        with clock.of("decoder"):
            torch.autograd.backward(outputs, [leaf.grad for leaf in leaves])
        with clock.of("encoder"):
            reached = [
                (part, leaf.grad)
                for part, leaf in zip((prefix, *layers), (cut_prefix, *cut), strict=True)
                if leaf.grad is not None
            ]
            torch.autograd.backward([part for part, _ in reached], [gradient for _, gradient in reached])

    return take


def _told(config: PretrainConfig, clock: Clock, seconds: float, steps: int) -> dict[str, Any]:
    total = sum(clock.seconds.values())
    shares = {part: spent / total for part, spent in clock.seconds.items()}
    advice = advise(shares, config)
    print(
        f"{steps} steps of {config.batch_size} views, {seconds:.3f} s each: {config.batch_size / seconds:.1f} images/s"
    )
    for part, share in shares.items():
        print(f"  {part:10} {100 * share:5.1f} %  {'#' * round(40 * share):40}  {PART_WORDS[part]}")
    print(advice)
    return {
        "steps": steps, "seconds": seconds, "images_per_second": config.batch_size / seconds,
        "shares": {part: round(share, 4) for part, share in shares.items()}, "advice": advice,
    }  # fmt: skip


def advise(shares: dict[str, float], config: PretrainConfig) -> str:
    """What to change first, in a sentence.

    Args:
        shares: part -> its share of a step.
        config: of the run.
    """

    def of(part: str) -> str:
        return f"the {part} is {100 * shares[part]:.0f} % of a step"

    workers = worker_count(config.workers)
    if shares["loader"] > LOUD:
        return f"{of('loader')}: give --workers {workers + 4} (now {workers}) where there are cores, or tokenize with --pixels raw"
    if config.target == "teacher" and shares["target"] > LOUD:
        return f"{of('target').replace('target', 'online teacher')}: --target tokens reads the same from the store"
    if shares["copy"] > LOUD:
        return f"{of('copy')}: the bus is slow, or the store's tokens are wide; tokenize with --codec pq48"
    if shares["optimiser"] > LOUD:
        return f"{of('optimiser')}: a larger --batch-size makes fewer of them"
    if shares["decoder"] > shares["encoder"]:
        return f"{of('decoder')}: give --decoder-depth 1, or a smaller --decoder-width"
    return f"{of('encoder')}: that is where the time should go; faster is --precision bf16-mixed or --compile on a GPU, or more devices"

"""What a command hands to the training driver: a network, its data, a step, and what is measured on the way."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.utils.data import Dataset

from fastmae.runtime.fabric import Fabric
from fastmae.training.optimiser import cosine_schedule
from fastmae.training.sampler import ShuffleOrder, StepSampler

Step = Callable[[nn.Module, Any], Mapping[str, torch.Tensor]]
"""(model, batch on the device) -> scalars to log; 'loss' is minimised."""
ParameterGroups = list[dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """The size of a run: the options that were given, and what a recipe makes of those that were left open.

    Attributes:
        images: number of training images.
        epochs: passes over them.
        batch_size: images per step, over all processes.
        lr: peak learning rate of a step.
        warmup_epochs: epochs of linear warm-up.
        eval_every: epochs between two evaluations.
    """

    images: int
    epochs: float
    batch_size: int
    lr: float
    warmup_epochs: float
    eval_every: float = math.inf

    @property
    def steps(self) -> int:
        """Steps in the whole run."""
        return max(1, math.ceil(self.epochs * self.images / self.batch_size))

    @property
    def steps_per_epoch(self) -> float:
        """Not a whole number: epochs are laid end to end."""
        return self.images / self.batch_size

    @property
    def warmup_steps(self) -> int:
        """At most half of the run."""
        return min(round(self.warmup_epochs * self.steps_per_epoch), self.steps // 2)

    def epoch_of(self, step: int) -> float:
        """Epochs done after a step. The last step may reach beyond the last epoch, which does not count."""
        end = self.epochs if self.steps_per_epoch >= 1 else math.inf
        return min(step / self.steps_per_epoch, end)


def no_initialisation(_: nn.Module) -> str:
    """The network starts as it was built."""
    return ""


def nothing_to_move(_: Fabric) -> None:
    """The step uses nothing on the device but the model and the batch."""


def not_wrapped(batches: Iterable[Any], _: StepSampler) -> Iterator[Any]:
    """The loader's batches, with nothing to do on the way."""
    yield from batches


@dataclass(frozen=True)
class Picture:
    """A picture of what an evaluation has found. It is drawn once the figures are safe.

    Attributes:
        file: where it goes.
        png: draws it: the bytes of a PNG file.
    """

    file: Path
    png: Callable[[], bytes]


class Evaluated(NamedTuple):
    """What an evaluation gives.

    Attributes:
        figures: the same in every process.
        pictures: of the first process.
    """

    figures: Mapping[str, float]
    pictures: Sequence[Picture] = ()


@dataclass
class Task:
    """Everything about a run that is the command's own.

    Attributes:
        name: the command's name.
        out: folder of the run.
        headline: what is trained, for the line at the start.
        network: what is trained, on the CPU. Parameters that no step uses must not require gradients.
        dataset: `dataset[epoch, index]` is one visit to one image. Its random draws follow from (seed, epoch, index).
        step: computes the scalars of a step.
        parameter_groups: gives the optimizer's groups, once the network is on its device; they may have `lr_scale`.
        description: for run.json, JSON-able: together with the options, all that is needed to load the result.
        inputs: for inputs.json, JSON-able: where the inputs were found.
        evaluate: (bare network, fabric) -> figures and pictures; None: not measured.
        metric: figure by which best.pt is chosen; larger is better. Empty: no best.pt.
        shown: figures shown after each evaluation; empty: the first ones.
        schedule: of the learning rate: (optimizer, steps, warm-up steps, last learning rate).
        optimizer: (groups, learning rate) -> optimizer; None: AdamW with the options' betas.
        collate: samples -> batch; None: torch's own.
        order: order of the images in each epoch; None: a full shuffle.
        wrap_batches: passes the batches on and may work ahead (fetch what comes next).
        initialise: gives a new run's network other weights than random ones, and says which.
        to_device: moves what the step uses besides the model to the run's device.
        compile: whether to compile the network.
        step_in_forward: the model's forward pass is the whole step, so that the compiler sees target and loss too.
        strategy: of several processes, 'ddp' or 'fsdp'.
        sharded_blocks: modules that FSDP shards one by one.
        lr_flag: flag that lowers the learning rate, for a hint.
    """

    name: str
    out: Path
    headline: str
    network: nn.Module
    dataset: Dataset[Any]
    step: Step
    parameter_groups: Callable[[], ParameterGroups]
    description: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    evaluate: Callable[[nn.Module, Fabric], Evaluated] | None = None
    metric: str = ""
    shown: tuple[str, ...] = ()
    schedule: Callable[[torch.optim.Optimizer, int, int, float], Scheduler] = cosine_schedule
    optimizer: Callable[[ParameterGroups, float], torch.optim.Optimizer] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    order: ShuffleOrder | None = None
    wrap_batches: Callable[[Iterable[Any], StepSampler], Iterator[Any]] = not_wrapped
    initialise: Callable[[nn.Module], str] = no_initialisation
    to_device: Callable[[Fabric], None] = nothing_to_move
    compile: bool = False
    step_in_forward: bool = False
    strategy: str = "ddp"
    sharded_blocks: tuple[type, ...] = ()
    lr_flag: str = "--lr"

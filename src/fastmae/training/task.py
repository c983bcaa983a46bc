"""What the training driver has to know about a task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.utils.data import Dataset

from fastmae.runtime.fabric import Fabric
from fastmae.training.optimiser import cosine_schedule


def micro_batches(share: int, most: int) -> int:
    """Into how many equal parts a device's share of a batch is cut so that none has more than `most` views (0: no limit)."""
    least = -(-share // most) if most else 1
    return next(parts for parts in range(least, share + 1) if share % parts == 0)


@dataclass
class Task:
    """What the frame has to know.

    Attributes:
        name: the command's.
        network: what is trained, on the CPU. Parameters that no step uses must not require gradients.
        train_set: `train_set[epoch, index]` is one visit to one image; its draws follow from (seed, epoch, index) alone (`drawn_from`).
        step: (model, batch on the device) -> scalars; 'loss' is minimised.
        evaluate: (bare network, fabric) -> figures of val/, the same in every process; see `Evaluation.measure`.
        metric: the figure by which best.pt is kept; the larger the better.
        groups: parameter groups of the optimizer, with `lr_scale`.
        description: JSON-able, for run.json: with the rest of it, all that is needed to load the result.
        schedule: of the learning rate.
        optimizer: takes groups and a rate; None: AdamW with the options' betas.
        collate: samples -> batch; None: torch's own.
        told: figures that are printed after each evaluation; empty: the first ones.
    """

    name: str
    network: nn.Module
    train_set: Dataset[Any]
    step: Callable[[nn.Module, Any], Mapping[str, torch.Tensor]]
    evaluate: Callable[[nn.Module, Fabric], Mapping[str, float]]
    metric: str
    groups: list[dict[str, Any]]
    description: dict[str, Any] = field(default_factory=dict)
    schedule: Callable[[torch.optim.Optimizer, int, int, float], Scheduler] = cosine_schedule
    optimizer: Callable[[list[dict[str, Any]], float], torch.optim.Optimizer] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    told: tuple[str, ...] = ()

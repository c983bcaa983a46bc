"""What fine-tuning, probing, segmentation and detection share: everything but the data, the network, the step and the measure.

Each of those is a `Task`; it is trained here by the one loop (`training.loop.fit`), with its checkpoints, logs, precision and processes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from fastmae.config import SupervisedConfig
from fastmae.errors import InputError
from fastmae.runs.folder import RunFolder, read_evaluations, read_metrics
from fastmae.runtime.device import memory_hint
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import launch, on_first_process, scales_gradients
from fastmae.runtime.peers import ends_with_its_peers
from fastmae.runtime.workers import guarded, heed_only_the_parent, worker_count
from fastmae.training.evaluation import Evaluation
from fastmae.training.loop import fit
from fastmae.training.optimiser import layer_decayed_groups
from fastmae.training.sampler import StepSampler
from fastmae.training.state import TrainState
from fastmae.training.task import Task, micro_batches

NOT_OF_THE_RUN = (
    "data", "out", "config", "print_config", "json", "resume", "device", "devices", "workers", "save_every", "log_every", "micro_batch",
    "pictures", "checkpoint_activations",
)  # fmt: skip
"""Options that may change when a run is continued."""
LEAST_STEPS = 2000
"""Steps that a small data set is given, by more epochs than its recipe has; and at most `MOST_EPOCHS`."""
MOST_EPOCHS = 300
BATCHES_AN_EPOCH = 16
"""At least, by a smaller batch than the recipe's where the data are few."""


@dataclass(frozen=True)
class Recipe:
    """A published recipe's size, from which settings for other data follow.

    Attributes:
        images: of the data that it was made for.
        epochs: over them.
        batch_size: images a step.
        lr: at that batch size.
        warmup_epochs: of linear warm-up.
        lr_power: on small data the rate grows with the batch size to this power: 0.5 is usual for AdamW; 0 for LARS, whose steps are
            relative to the weights.
    """

    images: int
    epochs: int
    batch_size: int
    lr: float
    warmup_epochs: float
    lr_power: float = 0.5


@dataclass(frozen=True)
class Settings:
    """What a run is trained with: as asked for, or by the recipe."""

    images: int
    epochs: int
    batch_size: int
    lr: float
    warmup_epochs: float
    eval_every: float

    @property
    def steps(self) -> int:
        """In the whole run."""
        return max(1, math.ceil(self.epochs * self.images / self.batch_size))

    @property
    def steps_per_epoch(self) -> float:
        """Not a whole number: epochs are laid end to end."""
        return self.images / self.batch_size

    @property
    def warmup_steps(self) -> int:
        """At most half of the run."""
        return min(round(self.warmup_epochs * self.steps_per_epoch), self.steps // 2)


def settle(config: SupervisedConfig, recipe: Recipe, images: int) -> Settings:
    """The options that were left open, by the recipe and the number of training images.

    Data as large as the recipe's, or a tenth of it, get its values, and a rate in proportion to the batch. Smaller ones get a smaller batch
    (a power of two, so that an epoch has `BATCHES_AN_EPOCH` at least), a rate that follows it by `lr_power`, more epochs where they would
    come to fewer than `LEAST_STEPS`, and the same share of warm-up.

    Raises:
        InputError: a value out of its range.
    """
    _check(config)
    batch = config.batch_size or min(recipe.batch_size, max(8, 2 ** int(math.log2(max(1, images / BATCHES_AN_EPOCH)))))
    enough = min(MOST_EPOCHS, math.ceil(LEAST_STEPS * batch / images))
    epochs = config.epochs or max(recipe.epochs, enough)
    warmup = recipe.warmup_epochs * epochs / recipe.epochs if config.warmup_epochs is None else config.warmup_epochs
    power = 1.0 if images >= recipe.images / 10 else recipe.lr_power
    lr = recipe.lr * (batch / recipe.batch_size) ** power if config.lr is None else config.lr
    return Settings(images, epochs, batch, lr, warmup, config.eval_every or max(1.0, epochs / 10))


@ends_with_its_peers
def train_task(config: SupervisedConfig, task: Task, settings: Settings) -> dict[str, Any] | None:
    """Train to the end, or continue; measure; say so.

    Returns:
        What all such commands' JSON has, with the last evaluation's figures; None in all processes but the first.

    Raises:
        InputError: no --out, or one that holds another run; a batch that can't be dealt out.
    """
    if config.out is None:
        raise InputError("give --out DIR, the folder for what is trained")
    fabric = launch(config.device, config.precision, config.devices, config.seed)
    if settings.batch_size % fabric.world_size:
        raise InputError(f"--batch-size {settings.batch_size}: not a multiple of the {fabric.world_size} processes")
    parts = micro_batches(settings.batch_size // fabric.world_size, config.micro_batch)
    description = {
        "fastmae run": 1,
        "task": task.name,
        "options": _options(config),
        "settings": asdict(settings),
        **task.description,
    }
    out = config.out
    on_first_process(fabric, lambda: RunFolder(out, description, config.resume))
    folder = RunFolder(out, description, resume=True)

    state, schedule = _begin(config, task, settings, fabric, description)
    state.restore(fabric, folder)
    if fabric.is_global_zero:
        _announce(task, settings, fabric, parts, state.step)
    share = settings.batch_size // fabric.world_size // parts
    with memory_hint(f"give --micro-batch {max(1, share // 2)} (now {share}), and the same call continues"):
        fit(
            fabric, state, schedule, _batches(config, task, settings, state.step, fabric, parts), task.step, folder,
            what=task.name, steps=settings.steps, steps_per_epoch=settings.steps_per_epoch, batch_size=settings.batch_size, seed=config.seed,
            clip_grad=config.clip_grad, save_every=config.save_every, log_every=config.log_every, parts=parts,
            evaluation=_evaluation(task, settings, fabric),
        )  # fmt: skip
    return _outcome(folder, task, settings) if fabric.is_global_zero else None


def adamw_groups(config: SupervisedConfig, network: nn.Module, encoder: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups of an encoder (a part of the network, or all of it) and what stands on top, by the options."""
    return layer_decayed_groups(network, encoder, config.weight_decay, config.layer_decay)


def evaluation_batches(
    data: Dataset[Any],
    images: int,
    fabric: Fabric,
    batch_size: int,
    workers: int,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Iterator[Any]:
    """Batches of this process's share of val/, in order, on its device; each image is in one process's share."""
    share: Dataset[Any] = Subset(data, range(fabric.global_rank, images, fabric.world_size))
    loader = DataLoader(
        share, batch_size, num_workers=worker_count(workers), collate_fn=collate,
        pin_memory=fabric.device.type == "cuda", worker_init_fn=heed_only_the_parent,
    )  # fmt: skip
    return (fabric.to_device(batch) for batch in guarded(loader))


def _begin(
    config: SupervisedConfig, task: Task, settings: Settings, fabric: Fabric, description: dict[str, Any]
) -> tuple[TrainState, Scheduler]:
    ema = ModelEmaV3(task.network, config.ema, use_warmup=True, device=fabric.device) if config.ema else None
    model = fabric.setup_module(task.network)
    if task.optimizer is not None:
        optimizer = task.optimizer(task.groups, settings.lr)
    else:
        optimizer = torch.optim.AdamW(
            task.groups, lr=settings.lr, betas=config.betas, fused=not scales_gradients(fabric)
        )
    schedule = task.schedule(optimizer, settings.steps, settings.warmup_steps, config.min_lr)
    return TrainState(task.network, model, fabric.setup_optimizers(optimizer), description, ema), schedule


def _batches(
    config: SupervisedConfig, task: Task, settings: Settings, start: int, fabric: Fabric, parts: int
) -> Iterable[Any]:
    sampler = StepSampler(
        settings.images,
        settings.batch_size,
        settings.steps,
        config.seed,
        start,
        fabric.global_rank,
        fabric.world_size,
        parts,
    )
    loader = DataLoader(
        task.train_set, batch_sampler=sampler, num_workers=min(worker_count(config.workers), max(1, len(sampler))),
        collate_fn=task.collate, pin_memory=fabric.device.type == "cuda", worker_init_fn=heed_only_the_parent,
    )  # fmt: skip
    return (fabric.to_device(batch) for batch in guarded(loader))


def _evaluation(task: Task, settings: Settings, fabric: Fabric) -> Evaluation:
    every = math.ceil(settings.eval_every * settings.steps_per_epoch)
    return Evaluation(every, lambda network: task.evaluate(network, fabric), task.metric, task.told)


def _options(config: SupervisedConfig) -> dict[str, Any]:
    settled = {setting.name for setting in fields(Settings)}  # those stand in the settings, as they came out
    options = {
        name: value for name, value in asdict(config).items() if name not in NOT_OF_THE_RUN and name not in settled
    }
    return {name: str(value) if name == "weights" and value else value for name, value in options.items()}


def _announce(task: Task, settings: Settings, fabric: Fabric, parts: int, done: int) -> None:
    millions = sum(p.numel() for p in task.network.parameters() if p.requires_grad) / 1e6
    in_parts = f" in {parts} parts" if parts > 1 else ""
    print(
        f"{task.name}: {millions:.1f} M weights; {settings.images} images, {settings.epochs} epochs = {settings.steps} steps of "
        f"{settings.batch_size}{in_parts}{f', from step {done}' if done else ''}; lr {settings.lr:.2e}, warm-up {settings.warmup_steps} "
        f"steps; evaluated every {settings.eval_every:g} epochs; {fabric.world_size} x {fabric.device.type}",
        flush=True,
    )


def _outcome(folder: RunFolder, task: Task, settings: Settings) -> dict[str, Any]:
    evaluations, logged = read_evaluations(folder.path), read_metrics(folder.path)
    if not evaluations or not logged:
        raise InputError(f"{folder.path}: the run is finished, but its logs are gone; --no-resume trains again")
    last = {name: value for name, value in evaluations[-1].items() if name not in ("step", "epoch", "seconds")}
    best = max(evaluations, key=lambda entry: entry[task.metric] if entry[task.metric] is not None else -math.inf)
    return {
        **last,
        f"best_{task.metric}": best[task.metric], "best_epoch": best["epoch"], "best": str(folder.best),
        "epochs": settings.epochs, "steps": settings.steps, "loss": logged[-1]["loss"], "seconds": logged[-1]["seconds"],
        "images_per_second": logged[-1]["images_per_second"], "checkpoint": str(folder.checkpoint),
    }  # fmt: skip


def _check(config: SupervisedConfig) -> None:
    at_least: Sequence[tuple[int, tuple[str, ...]]] = (
        (1, ("epochs", "batch_size", "log_every")),
        (0, ("warmup_epochs", "min_lr", "weight_decay", "clip_grad", "micro_batch", "save_every")),
    )
    for least, names in at_least:
        for name in names:
            value = getattr(config, name)
            if value is not None and not least <= value < math.inf:
                raise InputError(f"--{name.replace('_', '-')} {value}: give {least} or more")
    for name in ("lr", "eval_every"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value}: give more than 0")
    if not 0 < config.layer_decay <= 1:
        raise InputError(f"--layer-decay {config.layer_decay}: give more than 0 and at most 1")
    if not 0 <= config.drop_path < 1 or not 0 <= config.ema < 1:
        raise InputError(f"--drop-path {config.drop_path}, --ema {config.ema}: give 0 to below 1")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise InputError(f"--betas {config.betas[0]} {config.betas[1]}: give two numbers from 0 to below 1")

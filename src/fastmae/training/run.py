"""A run in memory: the task on its devices, with everything that a step needs. Used by `train`, and to time steps."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from fastmae.config import TrainingConfig
from fastmae.errors import InputError
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import launch
from fastmae.runtime.processes import this_process
from fastmae.runtime.ring import FillsBatches, ring_batches
from fastmae.runtime.transfer import copied_ahead, held_batches
from fastmae.runtime.workers import batches
from fastmae.training.optimiser import adamw
from fastmae.training.sampler import StepSampler
from fastmae.training.state import TrainState
from fastmae.training.task import Settings, Step, Task


@dataclass
class Run:
    """A run on its devices.

    Attributes:
        config: the options.
        task: what is trained.
        settings: size of the run.
        fabric: launched.
        grad_accum_steps: batches per process whose gradients are accumulated to one step.
        state: network, optimizer and counters.
        schedule: of the learning rate, by step.
    """

    config: TrainingConfig
    task: Task
    settings: Settings
    fabric: Fabric
    grad_accum_steps: int
    state: TrainState
    schedule: Scheduler

    @property
    def device_batch_size(self) -> int:
        """Images that one device takes at once."""
        return self.settings.batch_size // self.fabric.world_size // self.grad_accum_steps


def launch_processes(config: TrainingConfig, task: Task, settings: Settings) -> tuple[Fabric, int]:
    """Start the processes that the options ask for.

    Returns:
        Fabric, and the number of gradient accumulation steps.

    Raises:
        InputError: devices that are not there, or a batch that can't be divided among them.
    """
    fabric = launch(config.device, config.precision, config.devices, config.seed, task.strategy, task.sharded_blocks)
    if settings.batch_size % fabric.world_size:
        raise InputError(f"--batch-size {settings.batch_size}: not a multiple of the {fabric.world_size} processes")
    return fabric, grad_accum_steps(settings.batch_size // fabric.world_size, config.micro_batch)


def set_up(config: TrainingConfig, task: Task, settings: Settings, fabric: Fabric, accum_steps: int) -> Run:
    """Put the task's network on its device, with its optimizer, schedule and moving average."""
    network = task.network
    model = set_up_model(fabric, task.network, task.step, task.compile, task.step_in_forward)
    ema = ModelEmaV3(network, config.ema, use_warmup=True) if config.ema else None  # a copy on the network's device
    optimizer = _optimizer(config, task, settings, fabric)
    schedule = task.schedule(optimizer, settings.steps, settings.warmup_steps, config.min_lr)
    task.to_device(fabric)
    state = TrainState(network, model.train(), fabric.setup_optimizers(optimizer), ema)
    return Run(config, task, settings, fabric, accum_steps, state, schedule)


class StepModule(nn.Module):
    """A network whose forward pass is the whole step, loss included: one graph for the compiler.

    Args:
        network: what is trained.
        step: see `Task`.
    """

    def __init__(self, network: nn.Module, step: Step):
        super().__init__()
        self.network, self.step = network, step

    def forward(self, held: "Held") -> Mapping[str, torch.Tensor]:
        """The step's scalars."""
        return self.step(self.network, held.batch)


class Held:
    """A batch that Fabric passes on as it is; a bare one's floating-point tensors it would cast.

    Args:
        batch: on the device.
    """

    def __init__(self, batch: Any):
        self.batch = batch


def set_up_model(fabric: Fabric, network: nn.Module, step: Step, compiled: bool, step_in_forward: bool) -> Any:
    """The network as Fabric runs it: on its device, wrapped for several processes, compiled if asked for."""
    module: nn.Module = StepModule(network, step) if step_in_forward else network
    return fabric.setup_module(cast(nn.Module, torch.compile(module)) if compiled else module)


def _optimizer(config: TrainingConfig, task: Task, settings: Settings, fabric: Fabric) -> torch.optim.Optimizer:
    groups = task.parameter_groups()
    if task.optimizer is not None:
        return task.optimizer(groups, settings.lr)
    return adamw(groups, settings.lr, config.betas, fabric)


def train_batches(run: Run) -> Iterator[Any]:
    """This process's batches on its device, from the state's step to the last; `grad_accum_steps` of them per step.

    On the CPU, a batch is valid until the next one is asked for: see `loader`.
    """
    step_sampler, device = sampler(run), run.fabric.device
    loaded = loader(run, step_sampler, held_batches(device))
    return run.task.wrap_batches(copied_ahead(loaded, device), step_sampler)


def sampler(run: Run) -> StepSampler:
    """Which images make up which of this process's batches."""
    return StepSampler(
        run.settings.images,
        run.settings.batch_size,
        run.settings.steps,
        run.config.seed,
        run.state.step,
        run.fabric.global_rank,
        run.fabric.world_size,
        run.grad_accum_steps,
        run.task.order,
    )


def loader(run: Run, step_sampler: StepSampler, held: int = 1) -> Iterator[Any]:
    """This process's batches as the loading processes give them: on the CPU, pinned for a GPU.

    Args:
        run: the run.
        step_sampler: as `sampler` gives it.
        held: how many of the latest batches must stay as they are. The memory of older ones is written anew.
    """
    task, device, workers = run.task, run.fabric.device, run.config.workers
    if isinstance(task.dataset, FillsBatches):
        return ring_batches(task.dataset, device, workers, step_sampler, step_sampler.micro_batch_size, held)
    return batches(task.dataset, device, workers, batch_sampler=step_sampler, collate=task.collate)


def train_step(run: Run, micro_batches: Iterable[Any]) -> dict[str, torch.Tensor]:
    """One step of the optimizer, over the gradients of `grad_accum_steps` batches: see `take_step`."""
    task = run.task
    step = forward_step if task.step_in_forward else task.step
    return take_step(run.fabric, run.state, step, micro_batches, run.grad_accum_steps, run.config.clip_grad)


def forward_step(model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor]:
    """The step of a model made from a `StepModule`."""
    scalars: Mapping[str, torch.Tensor] = model(Held(batch))
    return scalars


def take_step(
    fabric: Fabric, state: TrainState, step: Step, micro_batches: Iterable[Any], accum_steps: int, clip_grad: float
) -> dict[str, torch.Tensor]:
    """One step of the optimizer, over the gradients of `accum_steps` batches. It waits for nothing on the device.

    Args:
        fabric: of the run.
        state: network, optimizer and counters.
        step: computes a batch's scalars.
        micro_batches: on the device.
        accum_steps: number of batches.
        clip_grad: largest norm of the gradients; 0: any.

    Returns:
        The step's scalars, averaged over the batches, and `grad_norm`. They stay on the device.
    """
    scalars: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(micro_batches, 1):
        with fabric.no_backward_sync(state.model, enabled=fabric.world_size > 1 and number < accum_steps):
            outputs = step(state.model, batch)
            fabric.backward(_share(outputs["loss"], accum_steps))
        for name, value in outputs.items():
            share = _share(value.detach(), accum_steps)
            scalars[name] = scalars[name] + share if name in scalars else share
    grad_norm = state.clip_gradients(fabric, clip_grad)
    state.sound = False  # until `count_step`
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return {**scalars, "grad_norm": grad_norm}


def _share(value: torch.Tensor, accum_steps: int) -> torch.Tensor:
    """A batch's share of the mean over the step's batches."""
    return value if accum_steps == 1 else value / accum_steps


def images_at_once(config: TrainingConfig, batch_size: int) -> int:
    """Images of a batch that one process holds at once, nearly: see `grad_accum_steps`."""
    processes = max(config.devices, this_process().world_size)
    share = max(1, batch_size // processes)
    return min(share, config.micro_batch) if config.micro_batch else share


def grad_accum_steps(share: int, micro_batch: int) -> int:
    """The fewest equal batches that a device's share of a batch is cut into, so that none exceeds `micro_batch`.

    Args:
        share: images of the batch that are the device's, at least 1.
        micro_batch: most images at once; 0: no limit.
    """
    fewest = -(-share // micro_batch) if micro_batch else 1
    return next(steps for steps in range(fewest, share + 1) if share % steps == 0)

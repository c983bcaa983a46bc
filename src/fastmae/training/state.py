"""The state of a run: all that a checkpoint must hold for the run to continue as if it had not stopped."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_

from fastmae.errors import InputError, first_line
from fastmae.outside.tensors import check_fit, load_into
from fastmae.runs.checkpoint import load_to_continue, write_checkpoint
from fastmae.runs.folder import RunFolder
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import bare, on_first_process

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""Weights and optimizer state are gathered whole, also from a sharded network."""


@dataclass
class TrainState:
    """Network, optimizer and counters of a run.

    The random draws of a step (shuffle, views, masks, drop path) follow from the seed and the step's number, so no
    generator's state is kept. Weights and optimizer state are saved whole and by name, so that a run can continue with
    other devices and another strategy.

    Attributes:
        network: the bare module.
        model: the same, set up by Fabric.
        optimizer: set up by Fabric.
        ema: moving average of the network's weights, or None.
        step: number of steps done.
        seconds: training time over all calls.
        sums: sum of each scalar since the last log entry.
        summed_steps: number of steps in these sums.
        best: the largest value of the task's metric so far.
        sound: whether everything is as it was after `step` steps; not while an optimizer's step is under way.
    """

    network: nn.Module
    model: Any
    optimizer: Any
    ema: ModelEmaV3 | None = None
    step: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    summed_steps: int = 0
    best: float = -math.inf
    sound: bool = True

    @property
    def evaluated_network(self) -> nn.Module:
        """The network whose figures count: the moving average, if there is one."""
        return self.network if self.ema is None else self.ema.module

    def count_step(self) -> None:
        """After the optimizer's step: it is done."""
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.network, self.step)
        self.sound = True

    def save(self, fabric: Fabric, folder: RunFolder) -> None:
        """Write the checkpoint, whole or not at all. Every process takes part."""
        weights, optimizer = get_state_dict(self.network, bare(self.optimizer), options=WHOLE)
        checkpoint = {
            "precision": fabric.strategy.precision.state_dict(),  # the gradient scaler, in 16-mixed
            "model": weights,
            "optimizer": optimizer,
            **({"ema": self.ema.module.state_dict()} if self.ema is not None else {}),
            "run": folder.description,
            **{name: getattr(self, name) for name in COUNTERS},
        }
        on_first_process(fabric, lambda: write_checkpoint(folder.checkpoint, checkpoint))

    def restore(self, fabric: Fabric, folder: RunFolder) -> None:
        """Continue from the folder's checkpoint, if there is one.

        Raises:
            InputError: a damaged checkpoint, or one that only some of the processes can see.
        """
        if folder.checkpoint.exists():
            self._continue_from(load_to_continue(folder.checkpoint, with_ema=self.ema is not None), fabric, folder)
        steps: Any = fabric.all_gather(torch.tensor(self.step, device=fabric.device))
        if (steps != self.step).any():
            raise InputError(
                f"{folder.path}: the processes see different checkpoints; use a disk that all of them share"
            )

    def _continue_from(self, saved: dict[str, Any], fabric: Fabric, folder: RunFolder) -> None:
        check_fit(self.network, saved["model"], folder.checkpoint)
        try:
            set_state_dict(
                self.network,
                bare(self.optimizer),
                options=WHOLE,
                model_state_dict=saved["model"],
                optim_state_dict=saved["optimizer"],
            )
            if saved["precision"]:  # empty if the run has been trained without a scaler so far
                fabric.strategy.precision.load_state_dict(saved["precision"])
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"{folder.checkpoint}: its optimizer's state does not fit this run ({first_line(error)}); --no-resume "
                "starts anew, and sets this run aside"
            ) from error
        if self.ema is not None:
            load_into(self.ema.module, saved["ema"], folder.checkpoint)
        for name in COUNTERS:
            setattr(self, name, saved[name])

    def clip_gradients(self, fabric: Fabric, clip_grad: float) -> torch.Tensor:
        """Clip the gradients to a norm (0: not at all), and return the norm before. Nothing waits for the device."""
        fabric.strategy.precision.unscale_gradients(bare(self.optimizer))
        parameters = list(self.network.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm: Any = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if clip_grad > 0:
            clip_grads_with_norm_(parameters, clip_grad, norm)
        return norm


COUNTERS = ("step", "seconds", "sums", "summed_steps", "best")
"""The parts of a `TrainState` that are plain numbers."""

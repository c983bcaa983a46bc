"""The state of a training run: all that a checkpoint must hold for the run to continue as if it had not stopped."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from fastmae.errors import InputError
from fastmae.runs.checkpoint import load_checkpoint, write_checkpoint
from fastmae.runs.folder import RunFolder
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import bare, on_first_process

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class TrainState:
    """All that a checkpoint must hold for the run to go on as if it had not stopped.

    What a step draws (shuffle, views, masks, drop path) follows from the seed and the step's number; no generator's state is kept.
    Weights and optimizer state are kept whole and by name, so a run may go on with other devices and another strategy.

    Attributes:
        network: the bare module.
        model: the same, set up by Fabric.
        optimizer: set up by Fabric.
        run: the run's description (`RunFolder`), so that a checkpoint can stand alone.
        ema: moving average of the network, where asked for.
        step: steps done.
        seconds: of training, over all calls.
        sums: of the scalars since the last log entry.
        best: the largest figure that an evaluation gave.
    """

    network: nn.Module
    model: Any
    optimizer: Any
    run: dict[str, Any]
    ema: ModelEmaV3 | None = None
    step: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    best: float = -math.inf

    def save(self, fabric: Fabric, folder: RunFolder) -> None:
        """Write the checkpoint, whole or not at all."""
        held = self._as_dict(fabric)
        on_first_process(fabric, lambda: write_checkpoint(folder.checkpoint, held))

    def restore(self, fabric: Fabric, folder: RunFolder) -> None:
        """Go on from the folder's checkpoint, where there is one.

        Raises:
            InputError: a damaged checkpoint, or one that only some of the processes find.
        """
        if folder.checkpoint.exists():
            saved = load_checkpoint(folder.checkpoint)
            set_state_dict(
                self.network,
                bare(self.optimizer),
                options=WHOLE,
                model_state_dict=saved["model"],
                optim_state_dict=saved["optimizer"],
            )
            if self.ema is not None:
                self.ema.module.load_state_dict(saved["ema"])
            if saved["precision"]:  # none where the run went on so far without a scaler
                fabric.strategy.precision.load_state_dict(saved["precision"])
            self.step, self.seconds, self.sums = saved["step"], saved["seconds"], saved["sums"]
            self.best = saved.get("best", -math.inf)
        found: Any = fabric.all_gather(torch.tensor(self.step, device=fabric.device))
        if (found != self.step).any():
            raise InputError(
                f"{folder.path}: processes find different checkpoints there; it must lie on a disk that all of them share"
            )

    def _as_dict(self, fabric: Fabric) -> dict[str, Any]:
        weights, optimizer = get_state_dict(
            self.network, bare(self.optimizer), options=WHOLE
        )  # every process takes part
        return {
            "precision": fabric.strategy.precision.state_dict(),  # a gradient scaler's, in 16-mixed
            "model": weights,
            "optimizer": optimizer,
            **({"ema": self.ema.module.state_dict()} if self.ema is not None else {}),
            "run": self.run,
            "step": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
            "best": self.best,
        }

"""What is measured now and then while a run trains: logged, and the weights with the best figure kept."""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastmae.runs.checkpoint import write_checkpoint
from fastmae.runs.folder import MetricsLog, RunFolder
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import on_first_process

if TYPE_CHECKING:
    from fastmae.training.state import TrainState
TOLD = 4
"""Figures of an evaluation that are printed; all of them are logged."""


@dataclass(frozen=True)
class Evaluation:
    """A measurement every so many steps, and after the last one.

    Attributes:
        every: steps between two.
        measure: gives the figures, the same in every process; takes the bare network (its moving average where one is kept), which is
            in evaluation mode, without gradients and under the run's precision.
        metric: the figure by which the best weights are kept, in best.pt; the larger the better. Empty: none are kept.
        told: figures that are printed; empty: the first `TOLD`.
    """

    every: int
    measure: Callable[[torch.nn.Module], Mapping[str, float]]
    metric: str = ""
    told: tuple[str, ...] = ()

    def due(self, step: int, steps: int) -> bool:
        """Whether to measure after a step."""
        return step % self.every == 0 or step == steps

    def run(
        self, fabric: Fabric, state: "TrainState", folder: RunFolder, log: MetricsLog | None, epoch: float
    ) -> float:
        """Measure, log, keep the best.

        Returns:
            The seconds it took, which are none of the training's.
        """
        begun = time.monotonic()
        network = state.ema.module if state.ema is not None else state.network
        network.eval()
        with torch.no_grad(), fabric.autocast():
            found = dict(self.measure(network))
        state.model.train()
        if log is not None:
            names = self.told or tuple(itertools.islice(found, TOLD))
            told = ", ".join(f"{name} {found[name]:g}" for name in names if name in found)
            print(f"epoch {epoch:.4g} (step {state.step}): {told}", flush=True)
            log.write_evaluation(state.step, {"epoch": round(epoch, 4), "seconds": round(state.seconds, 3), **found})
        if self.metric and found[self.metric] > state.best:
            state.best = found[self.metric]
            held = {"model": network.state_dict(), "run": state.run, "step": state.step, "evaluation": found}
            on_first_process(fabric, lambda: write_checkpoint(folder.best, held))
        return time.monotonic() - begun

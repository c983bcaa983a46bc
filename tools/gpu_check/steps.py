"""A pre-training run in this process: its steps around a fixed batch, and with the real loader."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fastmae.config import PretrainConfig
from fastmae.pretraining.plan import make_plan
from fastmae.pretraining.pretrain import pretraining_task
from fastmae.runtime.arithmetic import float32_products
from fastmae.runtime.device import synchronise
from fastmae.runtime.seeding import seed_everything
from fastmae.training.meter import Meter
from fastmae.training.run import Run, launch_processes, set_up, train_batches, train_step
from gpu_check.setting import Setting

WARMUP, LEAST, MOST = 3, 3, 200
"""Steps before the timed ones; and how many are timed."""
AHEAD = 12
"""More batches than are loaded ahead."""


@dataclass(frozen=True)
class Trial:
    """A run whose steps are timed.

    Attributes:
        recipe: its recipe.
        codec: of its store's tokens.
        batch: views per step.
        compile: whether the step is compiled.
    """

    recipe: str
    codec: str
    batch: int
    compile: bool = False

    def __str__(self) -> str:
        return f"{self.recipe}, {self.codec}, batch {self.batch}, {'compiled' if self.compile else 'eager'}"


class Steps:
    """Steps of a run as the training loop makes them, without its logging and saving.

    Args:
        run: on its device.
    """

    def __init__(self, run: Run):
        self.run, self.meter = run, Meter(run.fabric, {}, 0)
        self.batches = train_batches(run)
        self.fixed = next(self.batches)

    def take(self, batch: Any) -> None:
        """One step."""
        state = self.run.state
        self.run.schedule.step_update(state.step)
        seed_everything(state.step)
        self.meter.add(train_step(self.run, [batch]))
        state.step += 1

    def fixed_rate(self, seconds: float) -> float:
        """Views per second with a batch that is on the device already."""
        for _ in range(WARMUP):
            self.take(self.fixed)
        once = self._seconds(LEAST, fixed=True) / LEAST
        number = min(MOST, max(LEAST, round(seconds / once)))
        return number * self.run.settings.batch_size / self._seconds(number, fixed=True)

    def loaded_rate(self, seconds: float, fixed_rate: float) -> float:
        """Views per second with the loader. What it has loaded ahead is used up first."""
        self._seconds(AHEAD, fixed=False)
        number = min(MOST, max(LEAST, round(seconds * fixed_rate / self.run.settings.batch_size)))
        return number * self.run.settings.batch_size / self._seconds(number, fixed=False)

    def _seconds(self, number: int, fixed: bool) -> float:
        device = self.run.fabric.device
        synchronise(device)
        start = time.perf_counter()
        for batch in [self.fixed] * number if fixed else islice(self.batches, number):
            self.take(batch)
        synchronise(device)
        return time.perf_counter() - start


@contextmanager
def steps_of(setting: Setting, trial: Trial) -> Iterator[Steps]:
    """The steps of a trial."""
    config = PretrainConfig(
        stores=(str(setting.store(trial.codec)),),
        run=Path("never-written"),
        recipe=trial.recipe,
        batch_size=trial.batch,
        compile=trial.compile,
        device=setting.device,
        **setting.sizes.encoder,
    )
    gc.collect()  # what the trial before has left
    if setting.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    plan = make_plan(config)
    task = pretraining_task(config, plan)
    try:
        with float32_products(torch.device(setting.device), tf32=True):  # as in `pretrain --precision auto`
            yield Steps(set_up(config, task, plan.settings, *launch_processes(config, task, plan.settings)))
    finally:
        torch.compiler.reset()  # or the next trial's sizes would be compiled as sizes that vary

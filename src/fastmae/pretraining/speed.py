"""How fast a run would train on this machine, and the epochs that fit into a given time."""

import itertools
import time
from dataclasses import replace

from fastmae.config import PretrainConfig
from fastmae.pretraining.plan import make_plan, open_stores
from fastmae.pretraining.pretrain import pretraining_task
from fastmae.runs.folder import RUN_FILE, read_run
from fastmae.runtime.device import synchronise
from fastmae.tokens import TokenStore
from fastmae.training.run import launch_processes, set_up, train_batches, train_step

WARMUP_STEPS = 2
"""The first steps also allocate memory and start the loading processes."""
FEWEST_STEPS = 2
"""Timed however slow they are."""


def fitted_to_time(config: PretrainConfig, seconds: float, timed_steps: int) -> PretrainConfig:
    """The options with as many epochs as fit into a time, so that the schedule ends with it.

    A run that was begun continues with the epochs that were chosen for it.

    Args:
        config: options of a run on one store.
        seconds: training time.
        timed_steps: steps for measuring the speed. Fewer are measured where they would take longer than the run itself.
    """
    if (config.run / RUN_FILE).exists():
        return config.with_epochs(read_run(config.run)["options"]["epochs"])
    images = len(TokenStore(config.stores[0]))
    speed = images_per_second(config, timed_steps, enough_seconds=seconds)
    return config.with_epochs(max(0.01, round(seconds * speed / images, 2)))


def images_per_second(config: PretrainConfig, timed_steps: int, enough_seconds: float) -> float:
    """Views per second of a run with these options, measured over some steps of a student that is thrown away.

    Args:
        config: options of the run.
        timed_steps: steps to measure.
        enough_seconds: fewer steps are measured if they take longer than this, but at least two.
    """
    images = len(open_stores(config)[0][0])
    config = replace(config, epochs=max(config.epochs, (WARMUP_STEPS + timed_steps) * config.batch_size / images))
    plan = make_plan(config)
    task = pretraining_task(config, plan)
    run = set_up(config, task, plan.settings, *launch_processes(config, task, plan.settings))
    batches = train_batches(run)
    for _ in range(WARMUP_STEPS):
        train_step(run, itertools.islice(batches, run.grad_accum_steps))
    synchronise(run.fabric.device)
    start = time.monotonic()
    for steps in range(1, timed_steps + 1):
        train_step(run, itertools.islice(batches, run.grad_accum_steps))
        if steps >= FEWEST_STEPS and time.monotonic() - start > enough_seconds:
            break
    synchronise(run.fabric.device)
    return config.batch_size * steps / (time.monotonic() - start)

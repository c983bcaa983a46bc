"""How fast a run would train on this machine, from a few steps of a student that is thrown away."""

import itertools
import time

from fastmae.config import PretrainConfig
from fastmae.pretraining.plan import make_plan
from fastmae.pretraining.pretrain import pretraining_task
from fastmae.training.run import launch_processes, set_up, take_step, train_batches

WARMUP_STEPS = 2
"""The first steps also allocate memory and start the loading processes."""


def images_per_second(config: PretrainConfig, timed_steps: int) -> float:
    """Views per second of a run with these options, measured over some steps."""
    plan = make_plan(config)
    task = pretraining_task(config, plan)
    fabric, grad_accum_steps = launch_processes(config, task, plan.settings)
    run = set_up(config, task, plan.settings, fabric, grad_accum_steps)
    batches = train_batches(run)
    start = 0.0
    for step in range(WARMUP_STEPS + timed_steps):
        if step == WARMUP_STEPS:
            start = time.monotonic()
        take_step(run, itertools.islice(batches, grad_accum_steps))
    return config.batch_size * timed_steps / (time.monotonic() - start)

"""Which of several processes this one is, as torchrun or srun tell it."""

import os
from dataclasses import dataclass

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
"""SLURM_STEP_... stand only in what srun started: a batch script's own shell has SLURM_NTASKS too, and is one process."""


@dataclass(frozen=True)
class Process:
    """One of several processes.

    Attributes:
        rank: its number among all, from 0.
        world_size: how many there are.
        local_rank: its number on its machine.
        local_world_size: how many are on its machine.
        launcher: 'torchrun', 'srun', or '' for a process that was started alone.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = ""


def this_process() -> Process:
    """What the environment says of this process."""
    for launcher, names in (("torchrun", TORCHRUN), ("srun", SRUN)):
        if all(name in os.environ for name in names):
            # SLURM writes `4` or `4(x2),3`: on two machines four, on one three. Fabric wants them equal, and says so.
            rank, world_size, local_rank, local_world_size = (
                int(os.environ[name].split("(")[0].split(",")[0]) for name in names
            )
            return Process(rank, world_size, local_rank, local_world_size, launcher)
    return Process()

"""Which of several processes this one is, by the variables of torchrun or srun; and whether another one still runs."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
"""srun alone sets SLURM_STEP_...; the shell of a batch script, which is one process, has SLURM_NTASKS too."""

LARGEST_PID = (1 << 31) - 1
"""A process's number is a C int."""


@dataclass(frozen=True)
class Process:
    """One of several processes.

    Attributes:
        rank: its number among all processes, from 0.
        world_size: number of all processes.
        local_rank: its number among the processes on its machine, from 0.
        local_world_size: number of processes on its machine.
        launcher: 'torchrun', 'srun', or '' for a process that was started alone.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = ""


def this_process() -> Process:
    """This process, as its launcher describes it."""
    for launcher, names in (("torchrun", TORCHRUN), ("srun", SRUN)):
        if all(name in os.environ for name in names):
            rank, world_size, local_rank, local_world_size = (_first_number(os.environ[name]) for name in names)
            return Process(rank, world_size, local_rank, local_world_size, launcher)
    return Process()


def _first_number(value: str) -> int:
    """4 for `4`, and for SLURM's `4(x2),3`: four tasks on each of two machines, three on another.

    Fabric refuses machines with unequal numbers of tasks.
    """
    return int(re.split(r"[(,]", value, maxsplit=1)[0])


def is_first_process() -> bool:
    """Whether this is the first of all processes, also before Fabric is launched (which sets LOCAL_RANK)."""
    return this_process().rank == 0 and os.environ.get("LOCAL_RANK", "0") == "0"


def is_running(pid: int, start: int | None = None) -> bool:
    """Whether there is a process with this number on this machine.

    Args:
        pid: any integer, also one that no process can have.
        start: if known, when it began (`born`): another process may have got the number since.
    """
    if not 0 < pid <= LARGEST_PID:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        pass
    now = _stat(pid)
    if now is None:
        return True
    state, began = now
    return state not in "ZX" and start in (None, began)  # a zombie has ended


def born(pid: int) -> int | None:
    """When a process of this machine began, in ticks since the machine did; None where that can't be told."""
    now = _stat(pid)
    return None if now is None else now[1]


def _stat(pid: int) -> tuple[str, int] | None:
    """A process's state and start, from Linux's /proc."""
    try:
        # Its name comes before, in brackets, and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, IndexError, ValueError):
        return None

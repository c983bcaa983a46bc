"""What a work takes of the memory at most, measured in a process of its own, so that nothing that ran before it counts."""

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastmae.errors import InputError

STATUS = Path("/proc/self/status")

Result = TypeVar("Result")


class FreshProcesses:
    """Runs functions each in a new process that has imported a module and computed nothing yet.

    Args:
        module: imported once, in the process from which the others are forked.
    """

    def __init__(self, module: str):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([module])

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What the function gives.

        Raises:
            InputError: the system ended the process, most likely for the memory that it took.
        """
        with ProcessPoolExecutor(1, mp_context=self.context) as pool:
            try:
                return pool.submit(function, *arguments).result()
            except BrokenProcessPool as error:
                raise InputError("a step needs more memory than there is; give a smaller --batch-size") from error


def peak_of(work: Callable[[], object], device: torch.device) -> float:
    """Megabytes (of 2^20 bytes, as the paper's) that a work takes at most.

    On a GPU: of what torch allocated there. Else of resident memory, beyond what the process had before.

    Args:
        work: with all that it builds.
        device: where it computes.
    """
    before = _peak_resident()
    work()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return (_peak_resident() - before) / 2**20


def _peak_resident() -> int:
    """Bytes. Linux hands the figure that `getrusage` gives down from a parent to its children, so there the status file is read."""
    if STATUS.exists():
        kilobytes = next(line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kilobytes) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

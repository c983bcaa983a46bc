"""The device to compute on, the number of cores, and what to do when the device's memory is full."""

import contextlib
import math
import os
from collections.abc import Iterator

import torch

from fastmae.errors import InputError, OneProcessError
from fastmae.runtime.processes import this_process


def resolve_device(name: str) -> torch.device:
    """`--device` as a device of this machine; 'auto' prefers a GPU to the CPU.

    Raises:
        InputError: an unknown name, or a device that this machine or this build of torch does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: unknown; use auto, cpu, cuda, cuda:N or mps") from error
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False) or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise InputError(
            f"--device {name}: not available on this machine or in torch {torch.__version__}; use --device cpu"
        )
    return torch.device("cpu") if device.type == "cpu" else device


def own_device(name: str) -> torch.device:
    """Like `resolve_device`, but the processes on one machine each get a GPU of their own.

    Raises:
        InputError: as in `resolve_device`.
    """
    device = resolve_device(name)
    if device.type == "cuda" and device.index is None:
        return resolve_device(f"cuda:{this_process().local_rank % torch.cuda.device_count()}")
    return device


def synchronise(device: torch.device) -> None:
    """Wait for what a GPU was given to do, so that it counts in a measured time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pins_memory(device: torch.device) -> bool:
    """Whether a copy from the CPU to this device is asynchronous only out of pinned (page-locked) memory."""
    return device.type == "cuda"


def free_bytes(device: torch.device) -> float:
    """Free memory of a GPU in bytes, with what torch keeps for reuse; infinite where this can't be asked."""
    if device.type != "cuda":
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def memory_hint(advice: str) -> Iterator[None]:
    """Turn an out-of-memory error of the device into one line with advice.

    Args:
        advice: what the user can do, such as 'use --micro-batch 64'.

    Raises:
        OneProcessError: in place of torch's OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OneProcessError(f"the device is out of memory; {advice}") from error

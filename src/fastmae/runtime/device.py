"""The device to compute on, the number of cores, and what to do when the device's memory is full."""

import contextlib
import logging
import os
from collections.abc import Iterator

import torch

from fastmae.errors import InputError, OneProcessError
from fastmae.runtime.processes import local_processes, this_process

log = logging.getLogger(__name__)


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


@contextlib.contextmanager
def pinned_in_place(memory: torch.Tensor, device: torch.device) -> Iterator[None]:
    """Pin memory where it is, if copies to the device need that (`pins_memory`), as long as the context lasts.

    Where the driver can't (it may limit the amount), the memory stays as it is, and copies out of it take longer.

    Args:
        memory: contiguous; other processes may write it meanwhile.
        device: where its content will be copied.
    """
    if not pins_memory(device):
        yield
        return
    cudart = torch.cuda.cudart()
    with torch.cuda.device(device):
        pinned = int(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0
    if not pinned:
        log.warning(f"{memory.nbytes / 1e9:.1f} GB could not be pinned, so copies to {device} take longer")
        with contextlib.suppress(RuntimeError):  # the driver reports its last error once more, at the next operation
            torch.zeros(1, device=device)
    try:
        yield
    finally:
        if pinned:
            synchronise(device)  # a copy may still read it
            cudart.cudaHostUnregister(memory.data_ptr())


def own_cores() -> int:
    """CPU cores of this process: its share of those that all processes of a run on this machine may use."""
    bound = this_process().launcher == "srun" and cores() < (os.cpu_count() or 1)  # srun gave each its own
    return cores() if bound else cores() // local_processes()


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

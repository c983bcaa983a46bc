"""What the machine has to compute with."""

import contextlib
import os
from collections.abc import Iterator

import torch

from fastmae.errors import InputError, OneProcessError
from fastmae.runtime.processes import this_process


def resolve_device(name: str) -> torch.device:
    """`--device` -> a device that is there; auto takes a GPU before the CPU.

    Raises:
        InputError: an unknown name, or a device that this machine or this torch does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: unknown; auto, cpu, cuda, cuda:N or mps") from error
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False) or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise InputError(
            f"--device {name}: this machine, or this build of torch {torch.__version__}, has none; take --device cpu"
        )
    return torch.device("cpu") if device.type == "cpu" else device


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_device(name: str) -> torch.device:
    """As `resolve_device`; of several processes on a machine, each takes a GPU of its own.

    Raises:
        InputError: as `resolve_device`.
    """
    device = resolve_device(name)
    if device.type == "cuda" and device.index is None:
        return resolve_device(f"cuda:{this_process().local_rank % torch.cuda.device_count()}")
    return device


@contextlib.contextmanager
def memory_hint(way_out: str) -> Iterator[None]:
    """A device that is out of memory as one line with a way out.

    Raises:
        OneProcessError: in place of torch's OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OneProcessError(f"the device is out of memory; {way_out}") from error

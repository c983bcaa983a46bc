"""The device to compute on, the number of cores, and what to do when the device's memory is full."""

import contextlib
import logging
import math
import os
from collections.abc import Iterator

import torch

from fastmae.errors import InputError, OneProcessError, is_out_of_memory
from fastmae.runtime.processes import this_process

log = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """`--device` as a device of this machine; 'auto' prefers a GPU of CUDA or MPS to the CPU.

    Any type of accelerator that torch has on this machine may be named.

    Raises:
        InputError: an unknown name, or a device that this machine or this build of torch does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: unknown; use auto, cpu, cuda, cuda:N or mps") from error
    if (device.index or 0) >= device_count(device.type):
        raise InputError(
            f"--device {name}: not available on this machine or in torch {torch.__version__}; use --device cpu"
        )
    return torch.device("cpu") if device.type == "cpu" else device


def device_count(device_type: str) -> int:
    """Number of devices of a type ('cuda', 'mps', 'xpu') on this machine; 0 if torch can't use them. One CPU."""
    module = getattr(torch, device_type, None)
    return 0 if module is None else module.device_count()


def own_device(name: str) -> torch.device:
    """Like `resolve_device`, but the processes on one machine each get an accelerator of their own.

    Raises:
        InputError: as in `resolve_device`.
    """
    device = resolve_device(name)
    if device.type != "cpu" and device.index is None:
        return torch.device(device.type, this_process().local_rank % device_count(device.type))
    return device


def synchronise(device: torch.device) -> None:
    """Wait for what an accelerator was given to do, so that it counts in a measured time."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def device_name(device: torch.device) -> str:
    """What the device calls itself, for example 'NVIDIA H100'; its type, if it says nothing."""
    name_of = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if name_of is None else name_of(device)


def supports_bf16(device: torch.device) -> bool | None:
    """Whether an accelerator computes in bf16 by itself, without emulation; None if it doesn't say."""
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return None if supported is None else supported(including_emulation=False)


def pins_memory(device: torch.device) -> bool:
    """Whether a copy from the CPU to this device is asynchronous only out of pinned (page-locked) memory."""
    return device.type not in ("cpu", "mps")  # MPS shares the CPU's memory


def free_bytes(device: torch.device) -> float:
    """Free memory of a GPU in bytes, with what torch keeps for reuse; infinite where this can't be asked."""
    if device.type != "cuda":
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


@contextlib.contextmanager
def pinned_in_place(memory: torch.Tensor, device: torch.device) -> Iterator[None]:
    """Pin memory where it is, for copies to an NVIDIA GPU (`pins_memory`), as long as the context lasts.

    Where the driver can't (it may limit the amount), and for other accelerators, the memory stays as it is, and copies
    out of it take longer.

    Args:
        memory: contiguous; other processes may write it meanwhile.
        device: where its content will be copied.
    """
    if device.type != "cuda":
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


def local_processes() -> int:
    """How many processes of this run share this machine, this one included."""
    process = this_process()
    if process.launcher:
        return process.local_world_size
    # Without a launcher, `--devices` started all of them on this machine.
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if several else 1


def own_cores() -> int:
    """CPU cores of this process: its share of those that all processes of a run on this machine may use."""
    bound = this_process().launcher == "srun" and cores() < (os.cpu_count() or 1)  # srun gave each its own
    return cores() if bound else cores() // local_processes()


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def memory_hint(advice: str) -> Iterator[None]:
    """Turn an error of a full memory, the device's or the machine's, into one line with advice.

    Args:
        advice: what the user can do, such as 'use --micro-batch 64'.

    Raises:
        OneProcessError: in place of torch's OutOfMemoryError, or of MemoryError.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        full = "the device is" if isinstance(error, torch.OutOfMemoryError) else "the machine is"
        raise OneProcessError(f"{full} out of memory; {advice}") from error

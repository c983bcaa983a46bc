"""Starts Lightning Fabric, which gives a run its device, its precision and its processes."""

import logging
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from fastmae.config import Precision
from fastmae.errors import InputError, first_line
from fastmae.runtime.device import cores, own_device, resolve_device
from fastmae.runtime.fabric import (
    ClusterEnvironment,
    Fabric,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from fastmae.runtime.peers import CONTINUES, prepare_to_watch, watch_peers
from fastmae.runtime.processes import this_process
from fastmae.runtime.strategy import strategy_for

ENVIRONMENTS: dict[str, type[ClusterEnvironment]] = {
    "": LightningEnvironment,
    "torchrun": TorchElasticEnvironment,
    "srun": SLURMEnvironment,
}
"""Launcher -> how Fabric learns about the processes. Fabric itself would take a SLURM batch script for an srun task."""


def launch(
    device: str, precision: Precision, devices: int, seed: int, strategy: str = "ddp", blocks: tuple[type, ...] = ()
) -> Fabric:
    """Start Fabric with one process, with `devices` processes of this command, or with those of torchrun or srun.

    Args:
        device: as `--device`.
        precision: as `--precision`.
        devices: number of processes on this machine, unless torchrun or srun has started them.
        seed: for random draws before the first step, such as initial weights.
        strategy: 'ddp' or 'fsdp', for several processes.
        blocks: classes of the modules that FSDP shards one by one.

    Raises:
        InputError: more devices than there are, or a strategy or precision that doesn't suit them.
    """
    _silence_fabric()
    torch_device = resolve_device(device)
    devices, nodes = _processes(devices)
    world_size = devices * nodes
    if torch_device.index is not None and world_size > 1:
        raise InputError(
            f"--device {device}: names one device, but there are {world_size} processes; "
            f"use --device {torch_device.type}"
        )
    available = torch.cuda.device_count() if torch_device.type == "cuda" else cores()
    bound = bool(this_process().launcher) and torch_device.type == "cuda"  # srun may show each process its own GPU only
    if devices > available and not bound:
        raise InputError(f"--devices {devices}: this machine has {available} ({torch_device.type})")
    fabric_precision = _precision(precision, torch_device)
    if fabric_precision == "16-mixed" and strategy == "fsdp" and world_size > 1:
        raise InputError(
            "--strategy fsdp: needs --precision bf16-mixed, tf32 or 32-true, "
            "since 16-mixed would scale the gradients of each shard on its own"
        )
    processes = (
        "auto" if world_size == 1 else strategy_for(strategy, world_size, blocks, fabric_precision == "bf16-mixed")
    )
    device_indices: int | list[int] = devices if torch_device.index is None else [torch_device.index]
    if bound:
        own = own_device(device)
        device_indices = [own.index]
        if not isinstance(processes, str):
            processes.parallel_devices = [own] * devices  # Fabric takes the one at this process's number on the machine
    try:
        fabric = Fabric(
            accelerator=torch_device.type,
            devices=device_indices,
            num_nodes=nodes,
            strategy=processes,
            precision=fabric_precision,
            plugins=ENVIRONMENTS[this_process().launcher](),
        )
    except (ValueError, RuntimeError) as error:  # a SLURM job of unequal machines, say
        raise InputError(f"--devices {devices}: the processes can't be set up ({first_line(error)})") from error
    if world_size > 1:
        prepare_to_watch()
    try:
        fabric.launch()
    except RuntimeError as error:
        if "Duplicate GPU" not in str(error):
            raise
        raise InputError(
            f"{this_process().launcher or '--devices'} has started several processes for one GPU; start one for each"
        ) from error
    watch_peers(fabric)
    torch.manual_seed(seed)
    return fabric


def bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside Fabric's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def on_first_process(fabric: Fabric, action: Callable[[], object]) -> None:
    """Do something in the first process while the others wait. If it fails there, it fails in all processes.

    Raises:
        InputError: raised by the action, or in place of its OSError (a full disk, say).
    """
    failure = ""
    if fabric.is_global_zero:
        try:
            action()
        except InputError as error:
            failure = str(error)
        except OSError as error:
            failure = f"{error.filename or 'writing'}: {error.strerror or error}; {CONTINUES}"
    failure = fabric.broadcast(failure)
    if failure:
        raise InputError(failure)


def take_first_buffers(network: nn.Module, fabric: Fabric) -> None:
    """Give all processes the first one's buffers, which are saved: batch norms that aren't synchronised drift apart."""
    if fabric.world_size > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)


def scales_gradients(fabric: Fabric) -> bool:
    """Whether the loss is scaled, as in 16-mixed.

    A fused optimizer must not be used then: it unscales gradients inside its step, after they were clipped.
    """
    return getattr(fabric.strategy.precision, "scaler", None) is not None


def _silence_fabric() -> None:
    """Hide Fabric's tips and notes: they are about using Fabric."""
    for name in ("lightning.fabric", "lightning_fabric", "lightning_utilities"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning_fabric")


def _processes(devices: int) -> tuple[int, int]:
    """`--devices` as processes per machine and machines. torchrun and srun have decided both already."""
    process = this_process()
    if not process.launcher:
        return devices, 1
    if devices not in (1, process.local_world_size):
        raise InputError(
            f"--devices {devices}: {process.launcher} has started {process.local_world_size} processes "
            f"on this machine; leave --devices out"
        )
    return process.local_world_size, process.world_size // process.local_world_size


def _precision(precision: Precision, device: torch.device) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    if precision != "auto":
        return "32-true" if precision == "tf32" else precision  # how it rounds is `arithmetic`'s
    if device.type != "cuda":
        return "32-true"  # measured: faster than bf16 on CPUs without bf16 units
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"

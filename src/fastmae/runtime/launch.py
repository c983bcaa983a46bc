"""Starts Lightning Fabric, which gives a run its device, its precision and its processes."""

import logging
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from fastmae.config import Precision
from fastmae.errors import InputError, first_line, is_full_disk, os_message
from fastmae.runtime.device import cores, device_count, own_device, resolve_device, supports_bf16
from fastmae.runtime.fabric import (
    ClusterEnvironment,
    CPUAccelerator,
    DDPStrategy,
    Fabric,
    LightningEnvironment,
    MixedPrecision,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from fastmae.runtime.peers import CONTINUES, connect, watch_peers
from fastmae.runtime.processes import this_process
from fastmae.runtime.strategy import strategy_for

FabricPrecision = Literal["32-true", "bf16-mixed", "16-mixed"]

ENVIRONMENTS: dict[str, type[ClusterEnvironment]] = {
    "": LightningEnvironment,
    "torchrun": TorchElasticEnvironment,
    "srun": SLURMEnvironment,
}
"""Launcher -> how Fabric learns about the processes. Fabric itself would take a SLURM batch script for an srun task."""
KNOWN_TO_FABRIC = ("cpu", "cuda", "mps")
"""Types of devices that Fabric can set up."""


class OtherAccelerator(CPUAccelerator):
    """A device of a type that Fabric doesn't know, such as Intel's xpu. To Fabric it is a CPU under another name."""

    def setup_device(self, device: torch.device) -> None:
        """Make it the current device."""
        torch.get_device_module(device).set_device(device)


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
    bound = bool(this_process().launcher) and torch_device.type == "cuda"  # srun may show each process its own GPU only
    available = cores() if torch_device.type == "cpu" else device_count(torch_device.type)
    if devices > available and not bound:
        raise InputError(f"--devices {devices}: this machine has {available} ({torch_device.type})")
    fabric_precision = _precision(precision, torch_device)
    if fabric_precision == "16-mixed" and strategy == "fsdp" and world_size > 1:
        raise InputError(
            "--strategy fsdp: needs --precision bf16-mixed, tf32 or 32-true, "
            "since 16-mixed would scale the gradients of each shard on its own"
        )
    environment = ENVIRONMENTS[this_process().launcher]()
    try:
        if torch_device.type not in KNOWN_TO_FABRIC:
            fabric = _on_other_accelerator(torch_device, world_size, fabric_precision, environment)
        else:
            sharing = None
            if world_size > 1:
                sharing = strategy_for(strategy, world_size, blocks, fabric_precision == "bf16-mixed")
            fabric = Fabric(
                accelerator=torch_device.type,
                devices=_device_indices(torch_device, devices, bound, sharing),
                num_nodes=nodes,
                strategy=sharing or "auto",
                precision=fabric_precision,
                plugins=environment,
            )
    except (ValueError, RuntimeError) as error:  # a SLURM job of unequal machines, say
        raise InputError(f"--devices {devices}: the processes can't be set up ({first_line(error)})") from error
    try:
        if world_size > 1:
            connect(fabric)
        else:
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


def _device_indices(
    device: torch.device, processes: int, bound: bool, sharing: DDPStrategy | ModelParallelStrategy | None
) -> int | list[int]:
    """The devices of this machine's processes, for Fabric: their number, or which one.

    Args:
        device: of the run.
        processes: on this machine.
        bound: whether a launcher gives each process a GPU, perhaps as the only one that it sees.
        sharing: how several processes share the work.
    """
    if bound:
        own = own_device(str(device))
        if sharing is not None:
            sharing.parallel_devices = [own] * processes  # Fabric takes the one at this process's number
        return [own.index]
    return processes if device.index is None else [device.index]


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
            failure = os_message(error) if is_full_disk(error) else f"{os_message(error)}; {CONTINUES}"
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


def _on_other_accelerator(
    device: torch.device, world_size: int, precision: FabricPrecision, environment: ClusterEnvironment
) -> Fabric:
    if world_size > 1:
        raise InputError(
            f"--device {device.type}: takes one process, but there are {world_size}; only cuda and cpu take several"
        )
    mixed = [] if precision == "32-true" else [MixedPrecision(precision, device.type)]
    strategy = SingleDeviceStrategy(torch.device(device.type, device.index or 0))
    return Fabric(accelerator=OtherAccelerator(), devices=1, strategy=strategy, plugins=[environment, *mixed])


def _precision(precision: Precision, device: torch.device) -> FabricPrecision:
    if precision != "auto":
        return "32-true" if precision == "tf32" else precision  # how it rounds is `arithmetic`'s
    supported = supports_bf16(device)
    if supported is None:
        return "32-true"  # measured: faster than bf16 on CPUs without bf16 units
    return "bf16-mixed" if supported else "16-mixed"

"""The Fabric that a run stands on: device, precision, processes."""

import logging
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from fastmae.config import Precision
from fastmae.errors import InputError, first_line
from fastmae.runtime.device import cores, resolve_device
from fastmae.runtime.fabric import (
    ClusterEnvironment,
    Fabric,
    LightningEnvironment,
    ModelParallelStrategy,
    SLURMEnvironment,
    Strategy,
    TorchElasticEnvironment,
)
from fastmae.runtime.peers import CONTINUES, watch_peers
from fastmae.runtime.processes import this_process

ENVIRONMENTS: dict[str, type[ClusterEnvironment]] = {
    "": LightningEnvironment,
    "torchrun": TorchElasticEnvironment,
    "srun": SLURMEnvironment,
}
"""Launcher -> what tells Fabric of its processes; named here, since Fabric's own choice takes a SLURM batch script for an srun task."""


def launch(
    device: str, precision: Precision, devices: int, seed: int, strategy: str = "ddp", blocks: tuple[type, ...] = ()
) -> Fabric:
    """Start Fabric: one process, `devices` processes of this command, or those that torchrun or SLURM has started.

    Args:
        device: as `--device`.
        precision: as `--precision`.
        devices: processes on this machine, where neither torchrun nor srun has started them.
        seed: for what is drawn before the first step (weights).
        strategy: of several processes, 'ddp' or 'fsdp'.
        blocks: modules that FSDP shards one by one.

    Raises:
        InputError: more devices than there are, or a strategy or precision that does not go with them.
    """
    # Fabric's tips and notes are about its own use, not the user's.
    for name in ("lightning.fabric", "lightning_fabric", "lightning_utilities"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning_fabric")
    chosen = resolve_device(device)
    process, nodes = this_process(), 1
    if process.launcher:
        if devices not in (1, process.local_world_size):
            started = f"{process.launcher} has started {process.local_world_size} processes on this machine"
            raise InputError(f"--devices {devices}: {started}; leave --devices out")
        devices, nodes = process.local_world_size, process.world_size // process.local_world_size
    if chosen.index is not None and devices * nodes > 1:
        raise InputError(
            f"--device {device}: names one device, for {devices * nodes} processes; take --device {chosen.type}"
        )
    available = torch.cuda.device_count() if chosen.type == "cuda" else cores()
    if not 1 <= devices <= available:
        raise InputError(f"--devices {devices}: this machine has {available} of {chosen.type}")
    settled = _precision(precision, chosen)
    if settled == "16-mixed" and strategy == "fsdp" and devices * nodes > 1:
        raise InputError(
            "--strategy fsdp: goes with --precision bf16-mixed or 32-true; 16-mixed would scale each shard alone"
        )
    try:
        fabric = Fabric(
            accelerator=chosen.type,
            devices=[chosen.index] if chosen.index is not None else devices,
            num_nodes=nodes,
            strategy=_strategy(strategy, devices * nodes, blocks),
            precision=settled,
            plugins=ENVIRONMENTS[process.launcher](),
        )
    except (ValueError, RuntimeError) as error:  # a SLURM job of unequal machines, say
        raise InputError(f"--devices {devices}: the processes can't be set up ({first_line(error)})") from error
    fabric.launch()
    watch_peers(fabric)
    torch.manual_seed(seed)
    if chosen.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return fabric


def bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside Fabric's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def on_first_process(fabric: Fabric, action: Callable[[], object]) -> None:
    """Do something once, while the other processes wait; where it fails, all of them fail, and none is left waiting.

    Raises:
        InputError: the action's own, or in place of its OSError (a full disk, say).
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


def scales_gradients(fabric: Fabric) -> bool:
    """Whether losses are scaled (16-mixed): a fused optimizer would unscale inside its step, too late for clipping."""
    return getattr(fabric.strategy.precision, "scaler", None) is not None


def _strategy(name: str, processes: int, blocks: tuple[type, ...]) -> str | Strategy:
    if processes == 1:
        return "auto"
    if name == "ddp":
        return "ddp"

    def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for module in model.modules():
            if isinstance(module, blocks):
                fully_shard(module, mesh=mesh["data_parallel"])
        fully_shard(model, mesh=mesh["data_parallel"])
        return model

    # FSDP2. Fabric's FSDPStrategy is the older FSDP, on CUDA only; this one also runs under gloo, so it is tested.
    return ModelParallelStrategy(
        shard, data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def _precision(wanted: Precision, device: torch.device) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "32-true"  # measured: on CPUs without bf16 units fp32 is the faster one
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"

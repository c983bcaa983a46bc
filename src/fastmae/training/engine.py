"""The Fabric that a run stands on: device, precision, processes."""

import logging
import os
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment
from lightning_fabric.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from fastmae.config import Precision
from fastmae.device import cores, resolve_device
from fastmae.errors import InputError


def launch(device: str, precision: Precision, devices: int, seed: int, strategy: str = "ddp", blocks: tuple[type, ...] = ()) -> Fabric:
    """Start Fabric: one process, `devices` processes of this command, or those that torchrun or SLURM has started.

    Args:
        device: as `--device`.
        precision: as `--precision`.
        devices: processes on this machine; torchrun's number goes before it.
        seed: for what is drawn before the first step (weights).
        strategy: of several processes, 'ddp' or 'fsdp'.
        blocks: modules that FSDP shards one by one.

    Raises:
        InputError: more devices than there are.
    """
    # Fabric's tips and notes are about its own use, not the user's.
    for name in ("lightning.fabric", "lightning_fabric", "lightning_utilities"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning_fabric")
    chosen = resolve_device(device)
    nodes = 1
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    elif SLURMEnvironment.detect():  # srun: a task for each process
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        devices = int(os.environ["SLURM_NTASKS"]) // nodes
    if chosen.index is not None and devices * nodes > 1:
        raise InputError(f"--device {device}: names one device, for {devices * nodes} processes; take --device {chosen.type}")
    available = torch.cuda.device_count() if chosen.type == "cuda" else cores()
    if not 1 <= devices <= available:
        raise InputError(f"--devices {devices}: this machine has {available} of {chosen.type}")
    fabric = Fabric(
        accelerator=chosen.type,
        devices=[chosen.index] if chosen.index is not None else devices,
        num_nodes=nodes,
        strategy=_strategy(strategy, devices * nodes, blocks),
        precision=_precision(precision, chosen),
    )
    fabric.launch()
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
            failure = (
                f"{error.filename or 'writing'}: {error.strerror or error}; what was saved before is kept, and the same call continues"
            )
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
    return ModelParallelStrategy(shard, data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)


def _precision(wanted: Precision, device: torch.device) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "32-true"  # measured: on CPUs without bf16 units fp32 is the faster one
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"

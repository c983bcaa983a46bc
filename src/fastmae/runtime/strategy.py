"""How several processes share the work: DDP, or FSDP2 with its mixed precision; and each process's own device."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fastmae.runtime.fabric import DDPStrategy, ModelParallelStrategy


def strategy_for(
    name: str, world_size: int, blocks: tuple[type, ...], bf16: bool
) -> DDPStrategy | ModelParallelStrategy:
    """The strategy of several processes.

    Args:
        name: 'ddp' or 'fsdp'.
        world_size: number of processes.
        blocks: classes of the modules that FSDP shards one by one.
        bf16: whether the run's precision is bf16-mixed.
    """
    if name == "ddp":
        # By default DDP packs the gradients anew after the first backward pass. The order in which three or more
        # processes are summed follows from the packing, so the first step after a restart would sum in another order.
        # A search for unused parameters keeps the first packing. There are none, of which torch warns.
        return DDPStrategy(find_unused_parameters=world_size > 2 and torch.are_deterministic_algorithms_enabled())
    block_policy = bf16_policy() if bf16 else MixedPrecisionPolicy()

    def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for module in model.modules():
            if isinstance(module, blocks):
                fully_shard(module, mesh=mesh["data_parallel"], mp_policy=block_policy)
        fully_shard(model, mesh=mesh["data_parallel"])
        return model

    # FSDP2. Fabric's FSDPStrategy is the older FSDP, which needs CUDA; this one also runs on gloo, so tests cover it.
    return ModelParallelStrategy(
        shard, data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def bf16_policy() -> MixedPrecisionPolicy:
    """FSDP's part in bf16-mixed: a block's weights are gathered in bf16, and its gradients are summed in float32.

    The precision of each operation stays with autocast, as under DDP, so a block's inputs are not cast: the residual
    stream keeps its dtype. The shards that the optimizer steps on and the checkpoint holds are float32. What lies
    outside the blocks is gathered in float32; it is little, and a CNN's batch norms there need it.
    """
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)

import pytest
import torch
import torch.distributed as dist
from timm.models.vision_transformer import Block
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from fastmae.runtime.arithmetic import deterministic_kernels
from fastmae.runtime.low_precision import with_fast_norms
from fastmae.runtime.strategy import strategy_for


class Network(nn.Module):
    """Two blocks between two linear layers. Notes the types of the weights that a block computes with."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 32), nn.Linear(32, 4)
        self.blocks = nn.Sequential(*(Block(32, 2) for _ in range(2)))
        self.seen = {}
        self.blocks[0].mlp.register_forward_pre_hook(self.note_weights)
        self.blocks[0].register_forward_hook(self.note_output)

    def note_weights(self, mlp, inputs):
        """Called in the block's forward pass, between gathering its weights and freeing them."""
        self.seen["block"] = mlp.fc1.weight.dtype

    def note_output(self, block, inputs, output):
        """The residual stream, which is in the dtype of the block's input if FSDP doesn't cast that."""
        self.seen["residual"] = output.dtype

    def forward(self, images):
        tokens = self.embed(images)
        self.seen["outside"] = self.embed.weight.dtype
        return self.head(self.blocks(tokens.float()).mean(1))


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    dist.destroy_process_group()


def trained_step(network, autocast):
    images = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = network(images)
    loss = output.float().square().mean()
    loss.backward()
    return loss


def gradients(network):
    found = {name: weight.grad for name, weight in network.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


@pytest.mark.parametrize("bf16", [True, False])
def test_fsdp_gathers_a_blocks_weights_in_bf16_and_steps_and_saves_in_float32(mesh, bf16):
    torch.manual_seed(0)
    plain, sharded = with_fast_norms(Network()), with_fast_norms(Network())
    sharded.load_state_dict(plain.state_dict())
    strategy_for("fsdp", 2, (Block,), bf16)._parallelize_fn(sharded, mesh)
    expected, loss = trained_step(plain, bf16), trained_step(sharded, bf16)
    gathered = torch.bfloat16 if bf16 else torch.float32
    assert sharded.seen == {"block": gathered, "outside": torch.float32, "residual": torch.float32}
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2 if bf16 else 1e-6, atol=0)
    for name, expected_gradient in gradients(plain).items():
        gradient = gradients(sharded)[name]
        assert gradient.dtype == torch.float32
        difference = (gradient - expected_gradient).norm() / expected_gradient.norm().clamp(min=1e-6)
        assert difference < (5e-2 if bf16 else 1e-5), name
    saved = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert all(torch.equal(saved[name], weight) for name, weight in plain.state_dict().items())


def test_ddp_keeps_its_first_packing_of_gradients_where_it_decides_the_order_of_sums():
    def searches(world_size):
        return strategy_for("ddp", world_size, (), bf16=False)._ddp_kwargs["find_unused_parameters"]

    assert not searches(3)
    with deterministic_kernels(True):
        assert searches(3)
        assert not searches(2)  # a + b = b + a

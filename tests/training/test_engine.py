import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision

from fastmae.errors import InputError
from fastmae.training.engine import launch, scales_gradients


def test_only_a_scaled_loss_forbids_the_fused_optimizer():
    scaled = Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cuda", scaler=torch.amp.GradScaler("cuda", enabled=False)))
    assert scales_gradients(scaled)
    assert not scales_gradients(Fabric(accelerator="cpu", precision="bf16-mixed"))
    assert not scales_gradients(Fabric(accelerator="cpu"))


def test_launch_seeds_and_stays_on_fp32_where_there_is_no_gpu():
    fabric = launch("cpu", "auto", 1, seed=5)
    assert (fabric.device.type, fabric.world_size, fabric.strategy.precision.precision) == ("cpu", 1, "32-true")
    first = torch.rand(3)
    launch("cpu", "auto", 1, seed=5)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize(("device", "devices", "says"), [("tpu", 1, "unknown"), ("cuda:9", 1, "has none"), ("cpu", 0, "--devices 0")])
def test_what_is_not_there_is_an_input_error(device, devices, says):
    with pytest.raises(InputError, match=says):
        launch(device, "auto", devices, seed=0)

import pytest
import torch
from lightning_fabric.plugins.precision import MixedPrecision

from fastmae.errors import InputError
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import launch, scales_gradients


def test_only_a_scaled_loss_forbids_the_fused_optimizer():
    scaled = Fabric(
        accelerator="cpu",
        plugins=MixedPrecision("16-mixed", "cuda", scaler=torch.amp.GradScaler("cuda", enabled=False)),
    )
    assert scales_gradients(scaled)
    assert not scales_gradients(Fabric(accelerator="cpu", precision="bf16-mixed"))
    assert not scales_gradients(Fabric(accelerator="cpu"))


def test_launch_seeds_and_stays_on_fp32_where_there_is_no_gpu():
    fabric = launch("cpu", "auto", 1, seed=5)
    assert (fabric.device.type, fabric.world_size, fabric.strategy.precision.precision) == ("cpu", 1, "32-true")
    first = torch.rand(3)
    launch("cpu", "auto", 1, seed=5)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize(
    ("device", "devices", "says"), [("tpu", 1, "unknown"), ("cuda:9", 1, "has none"), ("cpu", 0, "--devices 0")]
)
def test_what_is_not_there_is_an_input_error(device, devices, says):
    with pytest.raises(InputError, match=says):
        launch(device, "auto", devices, seed=0)


def test_a_launcher_that_has_started_processes_knows_how_many(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="torchrun has started 2 processes on this machine; leave --devices out"):
        launch("cpu", "auto", 4, seed=0)


def test_a_batch_script_of_slurm_is_one_process_whatever_its_job_asks_for(monkeypatch):
    for name, value in {
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NNODES": "2",
    }.items():
        monkeypatch.setenv(name, value)
    assert launch("cpu", "auto", 1, seed=0).world_size == 1


def test_sharded_gradients_are_not_scaled():
    with pytest.raises(InputError, match="--strategy fsdp"):
        launch("cpu", "16-mixed", 2, seed=0, strategy="fsdp")

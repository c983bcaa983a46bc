import pytest
import torch
from lightning_fabric.plugins.precision import MixedPrecision

from fastmae.errors import InputError
from fastmae.runtime import launch as launching
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import launch, scales_gradients


def test_only_16_mixed_scales_gradients():
    scaled = Fabric(
        accelerator="cpu",
        plugins=MixedPrecision("16-mixed", "cuda", scaler=torch.amp.GradScaler("cuda", enabled=False)),
    )
    assert scales_gradients(scaled)
    assert not scales_gradients(Fabric(accelerator="cpu", precision="bf16-mixed"))
    assert not scales_gradients(Fabric(accelerator="cpu"))


def test_launch_seeds_and_uses_fp32_on_a_cpu():
    fabric = launch("cpu", "auto", 1, seed=5)
    assert (fabric.device.type, fabric.world_size, fabric.strategy.precision.precision) == ("cpu", 1, "32-true")
    first = torch.rand(3)
    launch("cpu", "auto", 1, seed=5)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16-mixed"), (False, "16-mixed"), (None, "32-true")])
def test_the_precision_follows_from_what_the_device_says_of_bf16(supported, expected, monkeypatch):
    monkeypatch.setattr(launching, "supports_bf16", lambda device: supported)
    assert launching._precision("auto", torch.device("xpu")) == expected
    assert launching._precision("32-true", torch.device("xpu")) == "32-true"


@pytest.mark.parametrize(
    ("device", "devices", "option"), [("tpu", 1, "--device"), ("cuda:99", 1, "--device"), ("cpu", 9999, "--devices")]
)
def test_a_device_that_is_not_available_is_an_input_error(device, devices, option):
    with pytest.raises(InputError, match=f"{option} "):
        launch(device, "auto", devices, seed=0)


def test_devices_must_agree_with_the_processes_that_a_launcher_has_started(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="--devices 4: torchrun has started 2"):
        launch("cpu", "auto", 4, seed=0)


def test_a_slurm_batch_script_is_one_process_whatever_its_job_asks_for(monkeypatch):
    for name, value in {
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NNODES": "2",
    }.items():
        monkeypatch.setenv(name, value)
    assert launch("cpu", "auto", 1, seed=0).world_size == 1


def test_fsdp_refuses_scaled_gradients():
    with pytest.raises(InputError, match="--strategy fsdp"):
        launch("cpu", "16-mixed", 2, seed=0, strategy="fsdp")

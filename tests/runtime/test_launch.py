import pytest
import torch
from lightning_fabric.plugins.precision import MixedPrecision

from fastmae.errors import InputError
from fastmae.runtime import launch as launch_module
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
    monkeypatch.setattr(launch_module, "supports_bf16", lambda device: supported)
    assert launch_module._precision("auto", torch.device("xpu")) == expected
    assert launch_module._precision("32-true", torch.device("xpu")) == "32-true"


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


TORCHRUN_RANK_2 = {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
SRUN_RANK_2 = {
    "SLURM_PROCID": "6",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
}


@pytest.fixture
def gpus(monkeypatch):
    """(number) -> so many GPUs are visible to this process. Fabric connects no processes."""

    def see(number):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(Fabric, "launch", lambda fabric: None)
        monkeypatch.setattr(launch_module, "watch_peers", lambda fabric: None)

    return see


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(("visible", "index"), [(1, 0), (2, 0), (4, 2), (8, 2)])
@pytest.mark.parametrize("variables", [TORCHRUN_RANK_2, SRUN_RANK_2])
def test_each_of_a_launchers_processes_takes_a_gpu_of_those_that_it_sees(
    variables, visible, index, strategy, gpus, monkeypatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    gpus(visible)  # srun --gpus-per-task 1 shows each process one, as cuda:0
    fabric = launch("cuda", "32-true", 1, seed=0, strategy=strategy)
    assert fabric.device == torch.device("cuda", index)
    assert (fabric.global_rank, fabric.local_rank, fabric.world_size) == (6, 2, 8)
    fabric.strategy.cluster_environment.validate_settings(fabric.strategy.num_processes, fabric.strategy.num_nodes)


def test_devices_needs_as_many_gpus(gpus):
    gpus(1)
    with pytest.raises(InputError, match="--devices 2: this machine has 1 "):
        launch("cuda", "32-true", 2, seed=0)


def test_several_processes_on_one_gpu_are_an_input_error(gpus, monkeypatch):
    def refuse(_):
        raise RuntimeError("NCCL error in: init.cpp\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA device 1")

    gpus(1)
    for name, value in TORCHRUN_RANK_2.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Fabric, "launch", refuse)
    with pytest.raises(InputError, match="torchrun has started several processes for one GPU"):
        launch("cuda", "32-true", 1, seed=0)


def test_tf32_is_float32_for_fabric():
    assert launch("cpu", "tf32", 1, seed=0).strategy.precision.precision == "32-true"

import contextlib

import pytest
import torch

from fastmae.errors import InputError
from fastmae.runtime import device as device_module
from fastmae.runtime.device import (
    device_count,
    device_name,
    free_bytes,
    memory_hint,
    own_cores,
    own_device,
    pinned_in_place,
    pins_memory,
    resolve_device,
    supports_bf16,
)


def test_an_out_of_memory_error_becomes_one_line_with_advice():
    with pytest.raises(InputError, match="use --micro-batch 8") as caught, memory_hint("use --micro-batch 8"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nand more")
    assert "\n" not in str(caught.value)


def test_the_cpu_is_always_available_and_an_unknown_device_is_named(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device("cpu") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="--device abacus"):
        resolve_device("abacus")


def test_the_free_memory_of_a_gpu_is_what_the_driver_has_and_what_torch_keeps_for_reuse(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert free_bytes(torch.device("cuda", 0)) == 1400
    assert free_bytes(torch.device("cpu")) == float("inf")


def test_the_cpu_is_one_device_without_a_name_or_bf16_units_that_it_tells_of():
    cpu = torch.device("cpu")
    assert (device_count("cpu"), device_name(cpu), supports_bf16(cpu), pins_memory(cpu)) == (1, "cpu", None, False)
    assert (device_count("meta"), device_count("abacus")) == (0, 0)
    with pytest.raises(InputError, match="--device meta: not available"):
        resolve_device("meta")  # torch knows the name, but nothing can be computed there


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_each_process_on_a_machine_gets_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert own_device("auto") == torch.device("cuda:0")


def test_processes_that_share_a_machines_cores_divide_them_and_those_bound_to_some_do_not(monkeypatch):
    monkeypatch.setattr(device_module, "cores", lambda: 16)
    monkeypatch.setattr(device_module.os, "cpu_count", lambda: 64)
    assert own_cores() == 16
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    assert own_cores() == 4
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    srun = {"PROCID": "0", "STEP_NUM_TASKS": "4", "LOCALID": "0", "STEP_TASKS_PER_NODE": "4"}
    for name, value in srun.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert own_cores() == 16  # srun bound this task to 16 of 64
    monkeypatch.setattr(device_module.os, "cpu_count", lambda: 16)
    assert own_cores() == 4


class Cudart:
    """The part of CUDA's runtime that pins memory; it refuses more than `limit` bytes."""

    def __init__(self, limit):
        self.limit, self.pinned = limit, {}

    def cudaHostRegister(self, address, count, flags):  # noqa: N802
        if count > self.limit:
            return 2
        self.pinned[address] = count
        return 0

    def cudaHostUnregister(self, address):  # noqa: N802
        del self.pinned[address]


@pytest.mark.parametrize("limit", [100, 99])
def test_memory_is_pinned_where_it_is_for_as_long_as_the_context_lasts(limit, monkeypatch, caplog):
    cudart, device = Cudart(limit), torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    memory = torch.zeros(100, dtype=torch.uint8)
    with pinned_in_place(memory, device):
        assert cudart.pinned == ({memory.data_ptr(): 100} if limit == 100 else {})
    assert cudart.pinned == {}
    assert ("could not be pinned" in caplog.text) == (limit < 100)
    with pinned_in_place(memory, torch.device("cpu")):
        assert cudart.pinned == {}

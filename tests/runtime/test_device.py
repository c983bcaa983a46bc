import pytest
import torch

from fastmae.errors import InputError
from fastmae.runtime.device import (
    device_count,
    device_name,
    free_bytes,
    memory_hint,
    own_device,
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

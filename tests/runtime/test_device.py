import pytest
import torch

from fastmae.errors import InputError
from fastmae.runtime.device import memory_hint, own_device, resolve_device


def test_a_device_out_of_memory_is_one_line_with_the_way_out():
    with pytest.raises(InputError, match="out of memory; give --micro-batch 8"), memory_hint("give --micro-batch 8"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\\nand more")


def test_the_cpu_is_always_there_and_what_is_not_is_named(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device("cpu") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="--device abacus: unknown"):
        resolve_device("abacus")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert own_device("auto") == torch.device("cuda:0")

import os
from dataclasses import dataclass

import pytest
import torch

from fastmae.errors import InputError
from fastmae.runtime import arithmetic
from fastmae.runtime.arithmetic import WORKSPACE, computes_as_asked, deterministic_kernels, float32_products

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def tf32():
    """Whether matrix products and convolutions on a GPU may use TF32."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def determinism():
    """All that `deterministic_kernels` sets."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
        os.environ.get(WORKSPACE),
    )


@pytest.mark.parametrize("allowed", [True, False])
def test_products_and_convolutions_round_to_tf32_as_asked_and_as_before_afterwards(allowed):
    before = tf32()
    with float32_products(CUDA, tf32=allowed):
        assert tf32() == (allowed, allowed)
        with float32_products(CUDA, tf32=not allowed):
            assert tf32() == (not allowed, not allowed)
        assert tf32() == (allowed, allowed)
    assert tf32() == before
    with pytest.raises(KeyError), float32_products(CUDA, tf32=allowed):
        raise KeyError
    assert tf32() == before


def test_a_setting_by_torchs_newer_names_is_kept():
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch 2.9 brought them")
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with float32_products(CUDA, tf32=False):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_a_cpu_has_no_tf32_and_its_settings_stay():
    before = tf32(), torch.get_float32_matmul_precision()
    with float32_products(CPU, tf32=True):
        assert (tf32(), torch.get_float32_matmul_precision()) == before


@pytest.mark.parametrize("workspace", [None, ":16:8", ":0:0"])
def test_determinism_holds_within_the_context_and_is_gone_afterwards(workspace, monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    if workspace is not None:
        monkeypatch.setenv(WORKSPACE, workspace)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = determinism()
    with deterministic_kernels(True):
        assert determinism() == (True, False, False, False, ":16:8" if workspace == ":16:8" else ":4096:8")
    assert determinism() == before
    with deterministic_kernels(False):
        assert determinism() == before


def test_an_operation_without_a_deterministic_kernel_is_one_line():
    before = determinism()
    message = r"^--deterministic: torch .* has no deterministic put_ "
    with pytest.raises(InputError, match=message) as caught, deterministic_kernels(True):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    assert "\n" not in str(caught.value)
    assert determinism() == before
    with pytest.raises(RuntimeError, match="mat1"), deterministic_kernels(True):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


@dataclass
class Config:
    precision: str
    device: str = "cuda"
    deterministic: bool = False


@computes_as_asked
def settings(config):
    return tf32(), torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("precision", ["auto", "32-true", "tf32", "bf16-mixed", "16-mixed"])
def test_only_32_true_rules_tf32_out(precision, monkeypatch):
    monkeypatch.setattr(arithmetic, "resolve_device", torch.device)
    allowed = precision != "32-true"
    assert settings(Config(precision)) == ((allowed, allowed), False)
    assert settings(Config(precision, deterministic=True)) == ((allowed, allowed), True)


def test_an_unknown_device_is_an_input_error():
    with pytest.raises(InputError, match="--device"):
        settings(Config("auto", device="nothing"))

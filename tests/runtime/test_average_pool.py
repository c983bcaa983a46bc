import pytest
import torch
import torch.nn.functional as F

from fastmae.runtime.arithmetic import deterministic_kernels
from fastmae.runtime.average_pool import AveragePool, average_pool


@pytest.mark.parametrize(("height", "width", "side"), [(7, 5, 3), (12, 12, 6), (5, 5, 5), (2, 3, 4), (6, 9, 1)])
def test_matrices_average_as_torchs_pooling_does_with_the_same_gradient(height, width, side):
    maps = torch.randn(2, 3, height, width, requires_grad=True)
    weights = torch.randn(2, 3, side, side)
    expected = F.adaptive_avg_pool2d(maps, side)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), maps)
    with deterministic_kernels(True):
        pooled = average_pool(maps, side)
        (gradient,) = torch.autograd.grad((pooled * weights).sum(), maps)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_autocast_does_not_round_the_averages():
    maps = torch.rand(1, 2, 9, 9)
    with deterministic_kernels(True), torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = AveragePool(2)(maps)
    torch.testing.assert_close(pooled, F.adaptive_avg_pool2d(maps, 2))


def test_without_determinism_it_is_torchs_own():
    maps = torch.rand(1, 2, 9, 7)
    assert torch.equal(AveragePool(2)(maps), F.adaptive_avg_pool2d(maps, 2))

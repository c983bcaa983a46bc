"""Linear layers by convolution are linear layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from fastmae.runtime.fast_linear import AVX512, LEAST_BATCH, LEAST_PRODUCTS, Linear, linear, with_fast_linear

SIZES = {"large": (32, 49, 96, 80), "few": (LEAST_BATCH - 1, 200, 96, 80), "small": (16, 5, 48, 48)}


def operands(batch, tokens, inputs, outputs):
    draws = torch.Generator().manual_seed(0)
    made = (torch.randn(*shape, generator=draws) for shape in ((batch, tokens, inputs), (outputs, inputs), (outputs,)))
    return [tensor.requires_grad_() for tensor in made]


def ops(work):
    with profile() as seen:
        work()
    return {event.key for event in seen.key_averages()}


@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_are_torchs(size):
    tokens, weight, bias = operands(*SIZES[size])
    for given in (
        (tokens, weight, bias),
        (tokens, weight),
        (tokens.unflatten(1, (1, -1)), weight, bias),
        (tokens[:, 1:], weight, bias),
    ):
        found, wanted = linear(*given), F.linear(*given)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        gradient = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
        used = [tokens, weight, bias][: len(given)]
        for mine, theirs in zip(
            torch.autograd.grad(found, used, gradient), torch.autograd.grad(wanted, used, gradient), strict=True
        ):
            torch.testing.assert_close(mine, theirs, atol=1e-2, rtol=1e-4)


@pytest.mark.skipif(not AVX512, reason="this CPU, or this torch, has no AVX-512 with oneDNN")
def test_only_large_fp32_layers_go_to_onednn():
    tokens, weight, bias = operands(*SIZES["large"])
    assert tokens.numel() * len(weight) >= LEAST_PRODUCTS
    assert "aten::mkldnn_convolution" in ops(lambda: linear(tokens, weight, bias))
    for size in ("few", "small"):
        assert not any("convolution" in name for name in ops(lambda size=size: linear(*operands(*SIZES[size]))))
    assert not any("convolution" in name for name in ops(lambda: linear(tokens.flatten(0, 1), weight, bias)))
    assert not any("convolution" in name for name in ops(lambda: linear(tokens.double(), weight.double())))
    with torch.autocast("cpu", torch.bfloat16):
        assert not any("convolution" in name for name in ops(lambda: linear(tokens, weight, bias)))


def test_a_fast_layer_counts_as_many_operations():
    tokens, weight, bias = operands(*SIZES["large"])
    counts = []
    for compute in (linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            compute(tokens, weight, bias).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * tokens.numel() * len(weight)


def test_a_networks_layers_change_their_way_and_nothing_else():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(96, 80), nn.GELU(), nn.Sequential(nn.Linear(80, 96, bias=False)))
    fast = with_fast_linear(copy.deepcopy(network))
    assert [type(module) for module in fast.modules() if isinstance(module, nn.Linear)] == [Linear, Linear]
    assert list(fast.state_dict()) == list(network.state_dict())
    tokens = torch.randn(32, 49, 96)
    torch.testing.assert_close(fast(tokens), network(tokens), atol=1e-4, rtol=1e-4)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), fast(tokens))

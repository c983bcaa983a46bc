"""Linear layers computed as convolutions give what torch's linear layers give."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from fastmae.runtime.fast_linear import (
    AVX512,
    LEAST_BATCH,
    LEAST_PRODUCTS,
    Linear,
    linear,
    linear_each,
    norm_and_linear,
    with_fast_linear,
)

SIZES = {"large": (32, 49, 96, 80), "few": (LEAST_BATCH - 1, 200, 96, 80), "small": (16, 5, 48, 48)}


def operands(batch, tokens, in_features, out_features):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, tokens, in_features), (out_features, in_features), (out_features,))
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


def operators_of(function):
    with profile() as profiler:
        function()
    return {event.key for event in profiler.key_averages()}


def uses_convolution(*arguments):
    return any("convolution" in name for name in operators_of(lambda: linear(*arguments)))


@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_equal_torchs(size):
    tokens, weight, bias = operands(*SIZES[size])
    for arguments in (
        (tokens, weight, bias),
        (tokens, weight),
        (tokens.unflatten(1, (1, -1)), weight, bias),
        (tokens[:, 1:], weight, bias),
    ):
        output, expected = linear(*arguments), F.linear(*arguments)
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
        grad_output = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        leaves = [tokens, weight, bias][: len(arguments)]
        gradients = torch.autograd.grad(output, leaves, grad_output)
        expected_gradients = torch.autograd.grad(expected, leaves, grad_output)
        torch.testing.assert_close(gradients, expected_gradients, atol=1e-2, rtol=1e-4)


@pytest.mark.skipif(not AVX512, reason="this CPU or this build of torch does not offer AVX-512 with oneDNN")
def test_only_large_fp32_layers_run_in_onednn():
    tokens, weight, bias = operands(*SIZES["large"])
    assert tokens.numel() * len(weight) >= LEAST_PRODUCTS
    assert "aten::mkldnn_convolution" in operators_of(lambda: linear(tokens, weight, bias))
    for size in ("few", "small"):
        assert not uses_convolution(*operands(*SIZES[size]))
    assert not uses_convolution(tokens.flatten(0, 1), weight, bias)
    assert not uses_convolution(tokens.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not uses_convolution(tokens, weight, bias)


def test_a_fast_layer_counts_as_many_flops_as_torchs():
    tokens, weight, bias = operands(*SIZES["large"])
    flops = []
    for function in (linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            function(tokens, weight, bias).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] == 3 * 2 * tokens.numel() * len(weight)


def test_a_network_with_fast_layers_keeps_its_parameters_and_outputs():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(96, 80), nn.GELU(), nn.Sequential(nn.Linear(80, 96, bias=False)))
    fast = with_fast_linear(copy.deepcopy(network))
    assert [type(module) for module in fast.modules() if isinstance(module, nn.Linear)] == [Linear, Linear]
    assert list(fast.state_dict()) == list(network.state_dict())
    tokens = torch.randn(32, 49, 96)
    torch.testing.assert_close(fast(tokens), network(tokens), atol=1e-4, rtol=1e-4)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), fast(tokens))


@pytest.mark.parametrize("size", SIZES)
def test_a_norm_with_two_readers_gives_the_sum_of_both_gradients(size):
    leaves = operands(*SIZES[size])
    tokens, weight, bias = leaves
    other = torch.randn_like(weight)
    expected_normed = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
    expected = F.linear(expected_normed, weight, bias)
    expected_alone = torch.autograd.grad(expected.square().sum(), leaves, retain_graph=True)
    expected_both = torch.autograd.grad(expected.square().sum() + (expected_normed @ other.T).square().sum(), leaves)
    compiled = torch.compile(norm_and_linear, backend="eager", fullgraph=True)
    for function in (norm_and_linear, compiled):
        output, normed = function(tokens, 1e-6, weight, bias)
        torch.testing.assert_close(normed, expected_normed)
        assert not normed._is_view()  # FSDP would warn
        both = torch.autograd.grad(output.square().sum() + (normed @ other.T).square().sum(), leaves)
        torch.testing.assert_close(both, expected_both, atol=1e-2, rtol=1e-4)
    alone, _ = norm_and_linear(tokens, 1e-6, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(alone.square().sum(), leaves), expected_alone, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_several_layers_give_what_each_gives(size):
    batch, tokens, in_features, out_features = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, out_features, in_features), (3, out_features), *3 * [(batch, tokens, in_features)]]
    leaves = [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]
    weights, biases, *layers = leaves
    expected = torch.stack([F.linear(*layer) for layer in zip(layers, weights, biases, strict=True)])
    grad_output = torch.randn(expected.shape, generator=generator)
    expected_gradients = torch.autograd.grad(expected, leaves, grad_output)
    compiled = torch.compile(linear_each, backend="eager", fullgraph=True)
    for function in (linear_each, compiled):
        output = function(layers, weights, biases)
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
        gradients = torch.autograd.grad(output, leaves, grad_output)
        torch.testing.assert_close(gradients, expected_gradients, atol=1e-2, rtol=1e-4)


def test_several_small_layers_copy_no_tokens():
    layers = [torch.randn(2, 5, 8, requires_grad=True) for _ in range(3)]
    weights, biases = torch.randn(3, 4, 8), torch.randn(3, 4)
    outputs = linear_each(layers, weights, biases)
    operators = operators_of(
        lambda: torch.autograd.grad(linear_each(layers, weights, biases), layers, outputs.detach())
    )
    assert not operators & {"aten::stack", "aten::cat", "aten::clone"}

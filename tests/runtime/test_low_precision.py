"""Weights cast together and norms in autocast's dtype: the same results as autocast's, from fewer kernels."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from fastmae.runtime.low_precision import (
    LayerNorm,
    autocast_dtype,
    call_cast,
    cast_together,
    fold_norm,
    layer_norm,
    with_fast_norms,
)

BF16 = torch.autocast("cpu", dtype=torch.bfloat16)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def gradients(module, run, tokens):
    module.zero_grad()
    run(tokens).float().square().sum().backward()
    return [parameter.grad for parameter in module.parameters()]


@pytest.mark.parametrize("context", [BF16, torch.autocast("cpu", enabled=False)])
def test_calling_with_cast_weights_gives_autocasts_outputs_and_gradients(context):
    module, tokens = mlp(), torch.randn(4, 8)
    with context:
        assert torch.equal(call_cast(module, tokens), module(tokens))
        by_autocast = gradients(module, module, tokens)
        together = gradients(module, lambda tokens: call_cast(module, tokens), tokens)
    for one, other, parameter in zip(by_autocast, together, module.parameters(), strict=True):
        assert other.dtype == parameter.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_weights_are_cast_in_one_call_and_their_gradients_come_back_in_fp32(monkeypatch):
    weights = [
        torch.randn(3, requires_grad=True),
        torch.randn(2, 2, requires_grad=True),
        torch.randn(5, requires_grad=True),
    ]
    calls, copy = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *lists: (calls.append(len(lists[0])), copy(*lists)))
    first, second, _ = cast_together(weights, torch.bfloat16)
    assert torch.equal(first, weights[0].bfloat16())
    (first.sum() + 2 * second.sum()).backward()
    assert calls == [3, 2]  # the third was not used
    assert torch.equal(weights[1].grad, torch.full((2, 2), 2.0))
    assert weights[2].grad is None


def test_a_norm_takes_and_gives_half_precision_under_autocast_only():
    norm, tokens = LayerNorm(8), torch.randn(4, 8)
    expected = F.layer_norm(tokens, (8,), eps=1e-6)
    assert torch.equal(norm(tokens), expected)
    with BF16:
        assert norm(tokens).dtype == layer_norm(tokens.bfloat16(), 1e-6).dtype == torch.bfloat16
        torch.testing.assert_close(norm(tokens).float(), expected, atol=0.03, rtol=0.03)


def test_all_norms_of_a_network_become_fast_and_keep_their_parameters():
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    names = list(network.state_dict())
    norms = [module for module in with_fast_norms(network).modules() if isinstance(module, nn.LayerNorm)]
    assert {type(norm) for norm in norms} == {LayerNorm}
    assert len(norms) == 25
    assert list(network.state_dict()) == names


def test_the_dtype_of_a_product_is_autocasts_for_fp32_and_the_tensors_own_otherwise():
    assert autocast_dtype(torch.zeros(1)) == torch.float32
    with BF16:
        assert autocast_dtype(torch.zeros(1)) == torch.bfloat16
        assert autocast_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_norms_scale_and_shift_fold_into_the_linear_layers_behind_it(with_bias):
    scale, shift, weight, bias = torch.randn(2, 8), torch.randn(2, 8), torch.randn(2, 5, 8), torch.randn(2, 5)
    tokens = torch.randn(2, 3, 8)
    with BF16:
        folded_weight, folded_bias = fold_norm(scale, shift, weight, bias if with_bias else None)
    for layer in range(2):
        expected = F.linear(
            tokens[layer] * scale[layer] + shift[layer], weight[layer], bias[layer] if with_bias else None
        )
        found = F.linear(tokens[layer], folded_weight[layer], folded_bias[layer])
        torch.testing.assert_close(found, expected)

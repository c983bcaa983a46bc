"""Attention and blocks with less memory traffic: timm's results, without timm's copies."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmae.runtime.low_precision import with_fast_norms
from fastmae.student.attention import PackedAttention, PackedBlock, with_packed_attention


class Names(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_outputs_and_gradients_are_timms_and_the_gradient_of_qkv_is_not_copied():
    torch.manual_seed(0)
    attention, tokens = Attention(48, num_heads=3, qkv_bias=True), torch.randn(2, 5, 48, requires_grad=True)
    results = []
    for module in (attention, with_packed_attention(attention)):
        output = module(tokens)
        with Names() as names:
            found = torch.autograd.grad(output.square().sum(), [tokens, *module.parameters()])
        results.append((output, *found))
        copies = names.called.count("aten::clone")
    assert type(attention) is PackedAttention
    torch.testing.assert_close(*results)
    assert copies <= 1  # of the output's gradient, on a CPU; timm's copies the stacked one too


def test_attention_with_options_stays_timms():
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, qk_norm=True, depth=2)
    assert {type(block.attn) for block in with_packed_attention(network).blocks} == {Attention}


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_block_that_gives_its_normalised_input_computes_what_timms_does(qkv_bias):
    torch.manual_seed(0)
    block = Block(48, num_heads=3, qkv_bias=qkv_bias, init_values=0.5).double()
    tokens = torch.randn(2, 5, 48, dtype=torch.float64, requires_grad=True)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    results = []
    for packed in (False, True):
        if packed:
            output, normed = with_packed_attention(with_fast_norms(block))(tokens, with_normed=True)
        else:
            output, normed = block(tokens), F.layer_norm(tokens, (48,), eps=block.norm1.eps)
        found = torch.autograd.grad((output.square() + normed.sin()).sum(), [tokens, *block.parameters()])
        results.append((output, normed, *found))
    assert type(block) is PackedBlock
    torch.testing.assert_close(*results)
    assert torch.equal(block(tokens), block(tokens, with_normed=False))


def test_a_block_with_another_norm_stays_timms():
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2)
    assert {type(block) for block in with_packed_attention(network).blocks} == {Block}
    assert {type(block) for block in with_packed_attention(with_fast_norms(network)).blocks} == {PackedBlock}

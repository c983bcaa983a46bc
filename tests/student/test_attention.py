"""Attention whose backward pass writes its gradient once: timm's results, without timm's copy."""

import timm
import torch
from timm.layers import Attention
from torch.utils._python_dispatch import TorchDispatchMode

from fastmae.student.attention import PackedAttention, with_packed_attention


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

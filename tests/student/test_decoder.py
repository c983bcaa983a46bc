"""The decoder's block computes less than timm's and gives the same."""

import pytest
import torch
from timm.models.vision_transformer import Block

from fastmae.bench.gemm import flops_of
from fastmae.student.decoder import DecoderBlock

B, V, N, W = 3, 4, 16, 32


@pytest.fixture
def blocks():
    """Ours and timm's, with the same weights."""
    torch.manual_seed(0)
    block = DecoderBlock(W, 4, qkv_bias=True)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    timms_block = Block(W, 4, qkv_bias=True)
    timms_block.load_state_dict(block.state_dict())
    return block, timms_block


@pytest.fixture
def inputs():
    """Visible tokens [B, V, W], the mask token at each position [N, W], and the masked positions [B, N - V]."""
    generator = torch.Generator().manual_seed(1)
    ids_shuffle = torch.rand(B, N, generator=generator).argsort(1)
    visible, mask_tokens = torch.randn(B, V, W, generator=generator), torch.randn(N, W, generator=generator)
    return visible.requires_grad_(), mask_tokens.requires_grad_(), ids_shuffle[:, V:]


def all_tokens(inputs):
    visible, mask_tokens, ids_mask = inputs
    return torch.cat([visible, mask_tokens[ids_mask]], dim=1)


def gradients(block, inputs, output):
    return torch.autograd.grad(output.square().sum(), [*inputs[:2], *block.parameters()])


@pytest.mark.parametrize("first", [0, 1, V, V + 1])
@pytest.mark.parametrize("projects_per_position", [True, False])
def test_outputs_and_gradients_equal_those_of_timms_block(first, projects_per_position, blocks, inputs):
    block, timms_block = blocks
    visible, *masked = inputs
    output = block(visible, first, masked) if projects_per_position else block(all_tokens(inputs), first)
    expected = timms_block(all_tokens(inputs))[:, first:]
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    block_gradients = gradients(block, inputs, output)
    assert all(gradient.any() for gradient in block_gradients)
    torch.testing.assert_close(block_gradients, gradients(timms_block, inputs, expected), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("unseen", [1, 2])
@pytest.mark.parametrize("first", [0, "V"])
def test_unseen_tokens_change_nothing_and_get_no_gradient(first, unseen, blocks, inputs):
    block, _ = blocks
    visible, *masked = inputs
    first = V - unseen if first else 0
    outputs = block(visible, first, masked, unseen), block(visible[:, unseen:], first, masked)
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-6)
    of_visible, *others = gradients(block, inputs, outputs[0])
    assert not of_visible[:, :unseen].any()
    torch.testing.assert_close([of_visible, *others], list(gradients(block, inputs, outputs[1])), atol=1e-4, rtol=1e-5)


def test_only_predicted_patches_take_queries_and_mlp_and_masked_ones_are_projected_once_per_position(blocks, inputs):
    block, timms_block = blocks
    visible, *masked = inputs
    square, num_masked = 2 * W * W, N - V
    assert flops_of(lambda: timms_block(all_tokens(inputs))) == 12 * square * B * N + 4 * B * N * N * W
    flops = flops_of(lambda: block(visible, V, masked))
    projections = square * (2 * B * V + 3 * N)
    assert flops == projections + 9 * square * B * num_masked + 4 * B * num_masked * N * W

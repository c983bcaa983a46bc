"""The decoder's block computes less than timm's and gives the same."""

import pytest
import torch
from timm.models.vision_transformer import Block

from fastmae.bench.gemm import flops_of
from fastmae.student.decoder import DecoderBlock

B, V, N, W = 3, 4, 16, 32


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    mine = DecoderBlock(W, 4, qkv_bias=True)
    for parameter in mine.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    timms = Block(W, 4, qkv_bias=True)
    timms.load_state_dict(mine.state_dict())
    return mine, timms


@pytest.fixture
def inputs():
    draws = torch.Generator().manual_seed(1)
    order = torch.rand(B, N, generator=draws).argsort(1)
    visible, by_place = torch.randn(B, V, W, generator=draws), torch.randn(N, W, generator=draws)
    return visible.requires_grad_(), by_place.requires_grad_(), order[:, V:]


def gradients(block, inputs, out):
    return torch.autograd.grad(out.square().sum(), [*inputs[:2], *block.parameters()])


@pytest.mark.parametrize("first", [0, 1, V])
@pytest.mark.parametrize("by_its_place", [True, False])
def test_what_is_computed_is_what_timms_block_gives_there_with_the_same_gradients(first, by_its_place, blocks, inputs):
    mine, timms = blocks
    visible, by_place, places = inputs
    found = mine(visible, first, (by_place, places)) if by_its_place else mine(whole(inputs), first)
    wanted = timms(whole(inputs))[:, first:]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for here, there in zip(gradients(mine, inputs, found), gradients(timms, inputs, wanted), strict=True):
        assert there.any()
        torch.testing.assert_close(here, there, atol=1e-3, rtol=1e-4)


def test_queries_and_mlp_are_those_of_what_is_predicted_and_a_masked_place_is_projected_once(blocks, inputs):
    mine, timms = blocks
    visible, by_place, places = inputs
    square, hidden = 2 * W * W, N - V
    assert flops_of(lambda: timms(whole(inputs))) == 12 * square * B * N + 4 * B * N * N * W
    spared = flops_of(lambda: mine(visible, V, (by_place, places)))
    assert spared == 3 * square * (B * V + N) + 9 * square * B * hidden + 4 * B * hidden * N * W


def whole(inputs):
    visible, by_place, places = inputs
    return torch.cat([visible, by_place[places]], dim=1)

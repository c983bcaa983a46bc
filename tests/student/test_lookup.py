"""Look-ups that are joined with other work give what that work gives on copies, and move no byte more than they say."""

import pytest
import torch
import torch.nn.functional as F

from fastmae.bench.counting import Counts
from fastmae.student.lookup import keys_and_values, linear_plus_rows

B, V, M, N, D, W = 3, 5, 7, 12, 6, 8


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def places(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(N, generator=generator)[:count] for _ in range(B)])


def assert_gradients_equal(output, expected, leaves):
    output_gradients, expected_gradients = (
        torch.autograd.grad(result, leaves, numbers(*expected.shape, seed=9).detach()) for result in (output, expected)
    )
    assert all(gradient.any() for gradient in output_gradients)
    torch.testing.assert_close(output_gradients, expected_gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("batch", [B, 160])  # the larger one may run as a convolution
def test_a_product_added_to_rows_equals_layer_plus_looked_up_rows(batch, is_frozen, has_bias):
    width = W if batch == B else 128
    tokens, weight, bias = (
        numbers(batch, V, D * width // W),
        numbers(width, D * width // W, seed=1),
        numbers(width, seed=2),
    )
    table, ids = numbers(N, width, seed=3), places(V)[torch.arange(batch) % B]
    table.requires_grad_(not is_frozen)
    output = linear_plus_rows(tokens, weight, bias if has_bias else None, table, ids)
    expected = F.linear(tokens, weight, bias if has_bias else None) + table[ids]
    torch.testing.assert_close(output, expected, atol=1e-5 if batch > B else 1e-6, rtol=1e-5)
    leaves = [tokens, weight, *([bias] if has_bias else []), *([] if is_frozen else [table])]
    if batch == B:
        assert_gradients_equal(output, expected, leaves)


def test_under_autocast_rows_and_product_have_its_dtype_and_gradients_the_weights():
    tokens, weight, bias, table, ids = numbers(B, V, D), numbers(W, D), numbers(W), numbers(N, W, seed=3), places(V)
    expected = F.linear(tokens, weight, bias) + table[ids]
    with torch.autocast("cpu", torch.bfloat16):
        output = linear_plus_rows(tokens, weight, bias, table, ids)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.02)
    gradients = torch.autograd.grad(output.float().sum(), [tokens, weight, bias, table])
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    torch.testing.assert_close(gradients[2], torch.full((W,), 1.0 * B * V))


def test_the_product_reads_and_writes_the_rows_once():
    tokens, weight, bias, table, ids = numbers(B, V, D), numbers(W, D), numbers(W), numbers(N, W), places(V)
    with Counts() as counts, torch.no_grad():
        linear_plus_rows(tokens, weight, bias, table, ids)
    assert counts.bytes["embedding"] == 4 * (N * W + B * V * W) + 8 * B * V
    assert counts.bytes["addmm"] == 4 * (B * V * D + W * D + 2 * B * V * W)
    assert counts.kernels["add"] == 1  # the bias, to the table
    assert counts.bytes["add"] == 4 * (2 * N * W + W)


@pytest.mark.parametrize("unseen", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keys_and_values_are_the_visible_tokens_and_then_the_rows_of_the_masked_ones(dtype, unseen):
    visible, table, ids_mask = numbers(B, unseen + V, 2 * W), numbers(N, 2 * W, seed=1), places(M)
    joined = torch.cat([visible[:, unseen:], table[ids_mask]], dim=1).to(dtype)
    parts = keys_and_values(visible.to(dtype), table.to(dtype), ids_mask, unseen)
    assert all(torch.equal(*pair) for pair in zip(parts, joined.split(W, dim=2), strict=True))


@pytest.mark.parametrize("unseen", [0, 2])
@pytest.mark.parametrize("heads_first", [True, False])
def test_gradients_of_keys_and_values_go_to_the_visible_tokens_and_the_table(heads_first, unseen):
    visible, table, ids_mask = numbers(B, unseen + V, 2 * W), numbers(N, 2 * W, seed=1), places(M)

    def loss(keys, values):
        by_head = [part.unflatten(2, (2, -1)).transpose(1, 2) for part in (keys, values)]
        keys, values = (part.contiguous() for part in by_head) if heads_first else by_head
        return (keys.square() * values.sin()).sum()

    joined = torch.cat([visible[:, unseen:], table[ids_mask]], dim=1)
    results = loss(*keys_and_values(visible, table, ids_mask, unseen)), loss(*joined.split(W, dim=2))
    gradients, expected = (torch.autograd.grad(result, [visible, table]) for result in results)
    assert all(gradient.any() for gradient in gradients)
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-5)


def test_each_row_is_moved_once_into_the_keys_and_values_and_only_visible_ones_out_of_their_gradients():
    visible, table, ids_mask = numbers(B, 1 + V, 2 * W), numbers(N, 2 * W), places(M)
    rows_visible, rows_masked, row = B * V, B * M, 4 * 2 * W
    with Counts() as counts:
        keys, values = keys_and_values(visible, table, ids_mask, 1)
    assert counts.bytes["copy_"] == 2 * rows_visible * row
    assert counts.bytes["index"] == min(N, rows_masked) * row + 8 * rows_masked + rows_masked * row
    assert sum(counts.kernels.values()) == 2
    of_keys, of_values = (torch.ones(B, V + M, W) for _ in range(2))
    with Counts() as counts:
        torch.autograd.grad([keys, values], [visible, table], [of_keys, of_values])
    assert counts.bytes["stack"] == 2 * rows_visible * row
    assert counts.kernels["embedding_dense_backward"] == 2
    assert counts.kernels["clone"] == 0

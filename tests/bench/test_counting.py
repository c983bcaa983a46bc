"""The counts of a step: by hand for a few operators, and within bounds for the whole."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmae.bench.counting import Counts, count_step, list_kernels
from fastmae.cli import run

TINY = (
    "--encoder-width 64 --encoder-depth 1 --encoder-heads 2 --image-size 64 --middle-size 96 --batch-size 4 "
    "--teachers vit_tiny_patch16_224"
).split()


def test_a_product_reads_two_matrices_and_writes_one():
    with Counts() as counts:
        torch.ones(4, 8) @ torch.ones(8, 16)
    assert (counts.kernels["mm"], counts.bytes["mm"], counts.flops) == (1, 4 * (32 + 128 + 64), 2 * 4 * 8 * 16)


def test_views_and_allocations_are_free_and_what_is_expanded_is_read_once():
    tokens = torch.ones(3, 4)
    with Counts() as counts:
        tokens.t()[1:].unsqueeze(0).expand(5, -1, -1)
        torch.empty(7)
        tokens.new_empty(2)
    assert not counts.kernels
    with Counts() as counts:
        torch.ones(1, 4).expand(3, 4) + tokens
    assert counts.bytes["add"] == 4 * (4 + 12 + 12)


def test_what_is_changed_in_place_is_read_and_written():
    tokens = torch.ones(10)
    with Counts() as counts:
        tokens.add_(torch.ones(10))
    assert counts.bytes["add_"] == 4 * (10 + 10 + 10)


def test_what_is_given_as_output_is_written_and_read_only_if_it_is_an_input_too():
    rows, left, right = torch.ones(4, 16), torch.ones(4, 8), torch.ones(8, 16)
    for out in (torch.empty(4, 16), rows):
        with Counts() as counts:
            torch.addmm(rows, left, right, out=out)
        assert counts.bytes["addmm"] == 4 * (32 + 128 + 2 * 64)
        assert counts.flops == 2 * 4 * 8 * 16
    with Counts() as counts:
        torch.add(rows, 1, out=torch.empty(4, 16))
    assert counts.bytes["add"] == 4 * (64 + 64)


def test_what_is_overwritten_is_not_read_and_a_look_up_reads_what_it_returns():
    tokens, ids = torch.ones(10, 8), torch.tensor([3, 5])
    with Counts() as counts:
        tokens.copy_(torch.ones(10, 8))
        torch._foreach_copy_([tokens], [torch.ones(10, 8, dtype=torch.bfloat16)])
        tokens.fill_(2)
        tokens[ids]
        F.embedding(torch.zeros(50, dtype=torch.int64), tokens)
    assert counts.bytes["copy_"] == 4 * (80 + 80)
    assert counts.bytes["_foreach_copy_"] == 2 * 80 + 4 * 80
    assert counts.bytes["fill_"] == 4 * 80
    assert counts.bytes["index"] == 4 * (16 + 16) + 8 * 2
    assert counts.bytes["embedding"] == 4 * (80 + 50 * 8) + 8 * 50


def test_a_list_takes_as_many_kernels_as_its_tensors_and_chunks_need():
    assert list_kernels([[torch.empty(3)] * 110]) == 1
    assert list_kernels([[torch.empty(3)] * 111]) == 2
    assert list_kernels([[torch.empty(3)] * 65, [torch.empty(3)] * 65]) == 2
    assert list_kernels([[torch.empty(320 * 65536 + 1, device="meta")]]) == 2


def test_attention_is_one_fused_kernel_and_three_backward_and_nothing_is_computed():
    q = nn.Parameter(torch.ones(2, 3, 5, 8))
    counts = count_step(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    assert (counts.kernels["attention"], counts.kernels["attention_backward"]) == (1, 3)
    assert counts.flops == 14 * 2 * 3 * 5 * 5 * 8
    assert counts.bytes["attention"] == 2 * q.numel() * 4  # one tensor is q, k and v; and the output
    assert torch.equal(q, torch.ones_like(q))


def test_the_command_counts_every_row_and_its_totals_are_fastmaes(capsys):
    assert run(["bench", "step", "--count", *TINY, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["method"]: row for row in result["rows"]}
    ours = rows["FastMAE, vit_tiny_patch16_224 offline"]
    assert {name: result[name] for name in ("kernels", "bytes_per_image", "flops_per_image")}.items() <= ours.items()
    assert sum(entry["kernels"] for entry in ours["operators"]) == ours["kernels"]
    assert rows["FastMAE, vit_tiny_patch16_224 online"]["flops_per_image"] > ours["flops_per_image"]
    assert rows["MAE, as published"]["kernels"] > 2 * rows["MAE"]["kernels"]


@pytest.mark.slow
def test_the_papers_step_stays_below_900_kernels_and_150_megabytes_a_view(capsys):
    args = ["bench", "step", "--count", "--rows", "offline", "--teachers", "vit_base_patch16_224", "--json"]
    assert run(args) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["kernels"] <= 900
    assert result["bytes_per_image"] <= 150e6
    assert result["flops_per_image"] == pytest.approx(31e9, rel=0.01)


def test_a_scaled_loss_is_refused(capsys):
    assert run(["bench", "step", "--count", "--precision", "16-mixed", *TINY]) == 2
    assert "--precision bf16-mixed" in capsys.readouterr().err

"""`bench step`: its figures agree with each other and with counts made by hand, and its rows train as they say."""

import json
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

from fastmae.bench.gemm import BlockProducts, flops_of
from fastmae.bench.memory import FreshProcesses, peak_of
from fastmae.bench.methods import MAE, PUBLISHED, Steps, methods
from fastmae.bench.published_mae import PublishedMae
from fastmae.cli import parse, run
from fastmae.errors import InputError
from fastmae.student.targets import NormPix, OnlineTokens, StoredTokens

ENCODER = ["--encoder", "vit_tiny_patch16_224", "--encoder-width", "48", "--encoder-depth", "2", "--encoder-heads", "3"]
SIZES = ["--image-size", "64", "--middle-size", "96", "--batch-size", "4", "--teachers", "vit_tiny_patch16_224"]
SMALL = [*ENCODER, *SIZES, "--device", "cpu"]
OFFLINE, ONLINE = "FastMAE, vit_tiny_patch16_224 offline", "FastMAE, vit_tiny_patch16_224 online"


@pytest.fixture
def steps():
    config = parse("bench step", SMALL)
    return Steps.launched(config), {method.name: method for method in methods(config)}


def test_times_ratios_shares_and_sizes_agree_and_the_markdown_file_says_what_they_hold_for(tmp_path, capsys):
    file = tmp_path / "step.md"
    assert run(["bench", "step", *SMALL, "--rounds", "2", "--warmup", "1", "--out", str(file), "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == [PUBLISHED, MAE, OFFLINE, ONLINE]
    for row in rows.values():
        assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"], rel=0.01)
        assert row["gemm_share"] == pytest.approx(
            row["gflops"] / result["gemm_gflops_per_second"] / row["seconds"], rel=0.1
        )
        assert row["times_mae"] == pytest.approx(rows[MAE]["seconds"] / row["seconds"], abs=0.01)
        assert row["times_published_mae"] == pytest.approx(rows[PUBLISHED]["seconds"] / row["seconds"], abs=0.01)
        assert (
            row["memory_mb"] > 4 * 4 * row["parameters_millions"] / 1.05
        )  # weights, gradients, two moments, 4 bytes each
    assert rows[ONLINE]["online_over_offline"] == pytest.approx(
        rows[ONLINE]["seconds"] / rows[OFFLINE]["seconds"], abs=0.01
    )
    assert rows[MAE]["parameters_millions"] == rows[PUBLISHED]["parameters_millions"]
    assert rows[OFFLINE]["parameters_millions"] == rows[ONLINE]["parameters_millions"]
    assert rows[OFFLINE]["token_bytes_per_image"] == 6 * 6 * 192 * 2
    assert [rows[name]["token_bytes_per_image"] for name in (PUBLISHED, MAE, ONLINE)] == [0, 0, 0]
    assert (rows[MAE]["paper_seconds"], rows[OFFLINE]["paper_seconds"]) == (0.14, None)
    text = file.read_text()
    assert all(f"| {name} |" in text for name in rows)
    assert all(f"- {name}: {value}" in text for name, value in result["settings"].items())
    assert {"CPU", "torch", "threads", "precision", "batch", "matrix products"} <= result["settings"].keys()
    assert ONLINE in err


def test_every_rows_step_trains_its_own_model_on_its_own_target(steps):
    made, rows = steps
    kinds = {PUBLISHED: type(None), MAE: NormPix, OFFLINE: StoredTokens, ONLINE: OnlineTokens}
    assert set(kinds) == set(rows)
    for name, kind in kinds.items():
        step = made.step(rows[name])
        assert type(step.target) is kind
        assert isinstance(step.model, PublishedMae) == (name == PUBLISHED)
        before = [p.detach().clone() for p in step.model.parameters() if p.requires_grad]
        step.run()
        after = [p for p in step.model.parameters() if p.requires_grad]
        assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True) if old.ndim > 1), name
        assert all(p.grad is None for p in after)
    students = [step.model for step in (made.step(rows[OFFLINE]), made.step(rows[ONLINE]))]
    assert students[0] is students[1]


def test_an_online_teacher_sees_the_view_or_the_whole_middle_image():
    costs = {}
    for online in ("view", "middle"):
        config = parse("bench step", [*SMALL, "--online", online])
        rows = {method.name: method for method in methods(config)}
        costs[online] = flops_of(Steps.launched(config).step(rows[ONLINE]).run)
    config = parse("bench step", SMALL)
    offline = flops_of(Steps.launched(config).step(rows[OFFLINE]).run)
    assert offline < costs["view"] < costs["middle"]
    patches = {"view": 4 * 4, "middle": 6 * 6}
    teacher = {online: cost - offline for online, cost in costs.items()}
    assert teacher["middle"] / teacher["view"] == pytest.approx(
        (patches["middle"] + 1) / (patches["view"] + 1), rel=0.1
    )


def test_operations_are_counted_as_by_hand():
    tokens = torch.randn(2, 5, 8, requires_grad=True)
    layer = nn.Linear(8, 6)
    assert flops_of(lambda: layer(tokens).sum().backward()) == 3 * 2 * 2 * 5 * 8 * 6
    query, key, value = (torch.randn(2, 3, length, 4, requires_grad=True) for length in (5, 7, 7))
    forward = flops_of(lambda: F.scaled_dot_product_attention(query, key, value))
    assert forward == 2 * 2 * 2 * 3 * 5 * 7 * 4
    both = flops_of(lambda: F.scaled_dot_product_attention(query, key, value).sum().backward())
    assert both == forward + 5 * forward // 2  # scores again, and four gradients


def test_a_blocks_products_are_those_of_its_linear_layers_forward_and_backward():
    products = BlockProducts(2, 5, 12, torch.device("cpu"), torch.float32)
    block, tokens = Block(12, 3, qkv_bias=True), torch.randn(2, 5, 12, requires_grad=True)
    attention = 3.5 * 2 * 2 * 2 * 5 * 5 * 12
    assert [flops_of(work) for work in products.ways().values()] == [products.flops, products.flops]
    assert products.flops == flops_of(lambda: block(tokens).sum().backward()) - attention


def hold(megabytes):
    return peak_of(lambda: torch.ones(megabytes, 2**18), torch.device("cpu"))


def test_the_peak_is_what_a_work_holds_and_not_what_ran_before_it():
    held = torch.ones(300, 2**18)  # by this process
    processes = FreshProcesses("fastmae.bench.memory")
    assert processes.run(hold, 200) == pytest.approx(200, abs=30)
    assert processes.run(hold, 20) == pytest.approx(20, abs=30)
    del held


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--image-size", "60"], "--image-size 60: not a multiple of --patch-size 16; take 64"),
        (["--image-size", "112"], "larger than --middle-size 96"),
        (["--teachers", "vit_no_such"], "--teachers vit_no_such"),
        (["--teachers", "resnet50"], "--teachers resnet50"),
        (["--teachers", "vit_tiny_patch16_224,vit_tiny_patch16_224"], "names one twice"),
        (["--encoder", "resnet50"], "--encoder resnet50"),
        (["--encoder-width", "50"], "can't build it"),
        (["--rounds", "0"], "--rounds 0"),
        (["--warmup", "0"], "--warmup 0"),
        (["--batch-size", "-1"], "--batch-size -1"),
        (["--threads", "-1"], "--threads -1"),
        (["--device", "abacus"], "--device abacus"),
        (["--out", "no-such-folder/x.md"], "its folder does not exist"),
    ],
)
def test_what_it_can_not_take_is_one_line(args, says, capsys):
    assert run(["bench", "step", *SMALL, *args]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("fastmae bench step: ")
    assert says in err


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_the_system_ends_is_one_line():
    with pytest.raises(InputError, match="smaller --batch-size"):
        FreshProcesses("fastmae.bench.memory").run(killed)

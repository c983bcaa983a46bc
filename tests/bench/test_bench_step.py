"""`bench step`: its figures are consistent and equal counts made by hand, and each row trains what it says."""

import json
import os
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

from fastmae.bench.gemm import BlockProducts, flops_of
from fastmae.bench.memory import FreshProcesses, peak_memory_of
from fastmae.bench.methods import MAE, PUBLISHED, Steps, methods
from fastmae.bench.published_mae import PublishedMae
from fastmae.cli import parse, run
from fastmae.errors import InputError
from fastmae.student.targets import NormPix, OnlineTokens, StoredTokens

ENCODER = ["--encoder", "vit_tiny_patch16_224", "--encoder-width", "48", "--encoder-depth", "2", "--encoder-heads", "3"]
SIZES = ["--image-size", "64", "--middle-size", "96", "--batch-size", "4", "--teachers", "vit_tiny_patch16_224"]
SMALL = [*ENCODER, *SIZES, "--device", "cpu"]
TEACHER = "vit_tiny_patch16_224"
OFFLINE, ONLINE = f"FastMAE, {TEACHER} offline", f"FastMAE, {TEACHER} online"
VISIBLE = f"visible patches alone, {TEACHER} offline"
DISTIL, DISTIL_ONLINE = f"distillation, {TEACHER} offline", f"distillation, {TEACHER} online"


@pytest.fixture
def small():
    config = parse("bench step", SMALL)
    return Steps.launched(config), {method.name: method for method in methods(config)}


def test_the_table_names_tf32():
    config = parse("bench step", [*SMALL, "--precision", "tf32"])
    assert Steps.launched(config).precision == "tf32"


@pytest.mark.slow
def test_times_ratios_shares_and_sizes_are_consistent_and_the_markdown_file_names_the_settings(tmp_path, capsys):
    file = tmp_path / "step.md"
    assert run(["bench", "step", *SMALL, "--rounds", "2", "--warmup", "1", "--out", str(file), "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    rows = {row["method"]: row for row in result["rows"]}
    mae, published, offline, online = (rows[name] for name in (MAE, PUBLISHED, OFFLINE, ONLINE))
    visible, distil, distil_online = (rows[name] for name in (VISIBLE, DISTIL, DISTIL_ONLINE))
    assert list(rows) == [PUBLISHED, MAE, OFFLINE, ONLINE, VISIBLE, DISTIL, DISTIL_ONLINE]
    for row in rows.values():
        seconds = row["seconds"]
        assert 0 < row["seconds_min"] <= seconds <= row["seconds_max"]
        assert row["images_per_second"] == pytest.approx(4 / seconds, rel=0.01)
        per_gflop = 1 / result["gemm_gflops_per_second"] / seconds
        rounding = 0.05 * per_gflop + 0.001
        assert row["gemm_share"] == pytest.approx(row["gflops"] * per_gflop, rel=0.1, abs=rounding)
        assert row["times_mae"] == pytest.approx(mae["seconds"] / seconds, abs=0.01)
        assert row["times_published_mae"] == pytest.approx(published["seconds"] / seconds, abs=0.01)
        # Weights, gradients and two moments of 4 bytes each.
        assert row["memory_mb"] > 4 * 4 * row["parameters_millions"] / 1.05
    for with_teacher, without in ((online, offline), (distil_online, distil)):
        expected = with_teacher["seconds"] / without["seconds"]
        assert with_teacher["online_over_offline"] == pytest.approx(expected, abs=0.01)
    assert visible["online_over_offline"] is None
    assert visible["gflops"] < offline["gflops"]
    assert visible["gflops"] < distil["gflops"] < distil_online["gflops"]
    assert [row["loss_terms"] for row in (published, mae, offline)] == ["decoder", "decoder", "decoder, 2 layers"]
    assert {row["loss_terms"] for row in (visible, distil, distil_online)} == {"last layer, relations"}
    assert [row["mask_ratio"] for row in (published, mae, offline)] == 3 * [0.75]
    assert [row["mask_ratio"] for row in (distil, distil_online)] == [0, 0]
    assert mae["parameters_millions"] == published["parameters_millions"]
    assert offline["parameters_millions"] == online["parameters_millions"]
    assert offline["token_bytes_per_image"] == 6 * 6 * 192 * 2
    assert [row["token_bytes_per_image"] for row in (published, mae, online)] == [0, 0, 0]
    assert (mae["paper_seconds"], offline["paper_seconds"]) == (0.14, None)
    text = file.read_text()
    assert all(f"| {name} |" in text for name in rows)
    assert all(f"- {name}: {value}" in text for name, value in result["settings"].items())
    assert {"CPU", "torch", "threads", "precision", "batch", "matrix products"} <= result["settings"].keys()
    assert ONLINE in err


def test_every_rows_step_trains_its_own_model_on_its_own_target(small):
    steps, rows = small
    target_types = {
        PUBLISHED: type(None),
        MAE: NormPix,
        OFFLINE: StoredTokens,
        ONLINE: OnlineTokens,
        VISIBLE: StoredTokens,
        DISTIL: StoredTokens,
        DISTIL_ONLINE: OnlineTokens,
    }
    assert set(target_types) == set(rows)
    for name, target_type in target_types.items():
        step = steps.step(rows[name])
        assert type(step.target) is target_type
        assert isinstance(step.model, PublishedMae) == (name == PUBLISHED)
        before = [p.detach().clone() for p in step.model.parameters() if p.requires_grad]
        step.run()
        after = [p for p in step.model.parameters() if p.requires_grad]
        assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True) if old.ndim > 1), name
        assert all(p.grad is None for p in after)
    assert steps.step(rows[OFFLINE]).model is steps.step(rows[ONLINE]).model
    assert steps.step(rows[DISTIL]).model is steps.step(rows[DISTIL_ONLINE]).model


def test_the_student_of_visible_patches_has_no_decoder_and_that_of_distillation_no_mask(small):
    steps, rows = small
    paper, visible, distil = (steps.step(rows[name]).model for name in (OFFLINE, VISIBLE, DISTIL))
    assert [student.has_decoder for student in (paper, visible, distil)] == [True, False, False]
    assert visible.visible < distil.visible == 4 * 4


@pytest.mark.slow
def test_only_the_rows_that_are_asked_for_are_there_and_a_ratio_to_one_that_is_not_is_none(printed_json):
    args = ["bench", "step", *SMALL, "--rows", "distil, mae", "--rounds", "1", "--warmup", "1", "--json"]
    assert run(args) == 0
    result = printed_json()
    assert [row["method"] for row in result["rows"]] == [MAE, DISTIL, DISTIL_ONLINE]
    assert {row["times_published_mae"] for row in result["rows"]} == {None}
    assert "nothing masked" in result["settings"]["matrix products"]


def test_rows_of_distillation_and_visible_patches_take_the_first_teacher():
    config = parse("bench step", [*SMALL, "--rows", "online,visible", "--teachers", "vit_small_patch16_224"])
    names = [method.name for method in methods(config)]
    assert names == [ONLINE, "FastMAE, vit_small_patch16_224 online", VISIBLE]


def test_an_online_teacher_sees_the_view_or_the_whole_middle_image():
    flops = {}
    for online in ("view", "middle"):
        config = parse("bench step", [*SMALL, "--online", online])
        rows = {method.name: method for method in methods(config)}
        flops[online] = flops_of(Steps.launched(config).step(rows[ONLINE]).run)
    config = parse("bench step", SMALL)
    offline = flops_of(Steps.launched(config).step(rows[OFFLINE]).run)
    assert offline < flops["view"] < flops["middle"]
    teacher_ratio = (flops["middle"] - offline) / (flops["view"] - offline)
    view_tokens, middle_tokens = 4 * 4 + 1, 6 * 6 + 1
    assert teacher_ratio == pytest.approx(middle_tokens / view_tokens, rel=0.1)


def test_operations_are_counted_as_by_hand():
    tokens = torch.randn(2, 5, 8, requires_grad=True)
    layer = nn.Linear(8, 6)
    assert flops_of(lambda: layer(tokens).sum().backward()) == 3 * 2 * 2 * 5 * 8 * 6
    query, key, value = (torch.randn(2, 3, length, 4, requires_grad=True) for length in (5, 7, 7))
    forward = flops_of(lambda: F.scaled_dot_product_attention(query, key, value))
    assert forward == 2 * 2 * 2 * 3 * 5 * 7 * 4
    both = flops_of(lambda: F.scaled_dot_product_attention(query, key, value).sum().backward())
    assert both == forward + 5 * forward // 2  # the scores again, and four gradients


def test_block_products_are_those_of_a_blocks_linear_layers_forward_and_backward():
    products = BlockProducts(2, 5, 12, torch.device("cpu"), torch.float32)
    block, tokens = Block(12, 3, qkv_bias=True), torch.randn(2, 5, 12, requires_grad=True)
    attention = 3.5 * 2 * 2 * 2 * 5 * 5 * 12
    assert [flops_of(run) for run in products.implementations().values()] == [products.flops, products.flops]
    assert products.flops == flops_of(lambda: block(tokens).sum().backward()) - attention


def allocate(megabytes):
    return peak_memory_of(lambda: torch.ones(megabytes, 2**18), torch.device("cpu"))


def test_peak_memory_is_what_the_work_holds_and_not_what_ran_before_it():
    held = torch.ones(300, 2**18)  # in this process
    processes = FreshProcesses("fastmae.bench.memory")
    assert processes.run(allocate, 200) == pytest.approx(200, abs=30)
    assert processes.run(allocate, 20) == pytest.approx(20, abs=30)
    del held


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--image-size", "60"], ["--image-size 60", "64"]),
        (["--image-size", "112"], ["--image-size 112", "--middle-size 96"]),
        (["--teachers", "vit_no_such"], ["vit_no_such"]),
        (["--teachers", "resnet50"], ["resnet50"]),
        (["--teachers", "vit_tiny_patch16_224"], ["--teachers vit_tiny_patch16_224,vit_tiny"]),
        (["--encoder", "resnet50"], ["--encoder resnet50"]),
        (["--encoder-width", "50"], ["--encoder"]),
        (["--rows", "mae,visble"], ["--rows mae,visble", "'visible'"]),
        (["--rows", ""], ["--rows"]),
        (["--device", "abacus"], ["--device abacus"]),
        (["--out", "no-such-folder/x.md"], ["--out no-such-folder/x.md"]),
    ],
)
def test_an_option_that_cannot_be_used_is_named_in_one_line(args, names, capsys):
    assert run(["bench", "step", *SMALL, *args]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("fastmae bench step: ")
    assert all(name in err for name in names)


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_the_system_kills_is_an_input_error_that_names_the_batch_size():
    with pytest.raises(InputError, match="--batch-size"):
        FreshProcesses("fastmae.bench.memory").run(kill_this_process)


def ctrl_c_is_ignored():
    return signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.promise("signals")
def test_ctrl_c_is_left_to_the_first_process_which_ends_the_others_at_once():
    processes = FreshProcesses("fastmae.bench.memory")
    assert processes.run(ctrl_c_is_ignored)
    threading.Timer(1, os.kill, [os.getpid(), signal.SIGINT]).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        processes.run(time.sleep, 60)
    assert time.monotonic() - start < 10

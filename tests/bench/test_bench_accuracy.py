"""`bench accuracy`: the real command on tiny images, what it refuses, and how its time is divided."""

import itertools
import json

import pytest
import torch
from PIL import Image

from fastmae.bench.accuracy_runs import MAE, AccuracyRuns, methods
from fastmae.cli import parse, run
from fastmae.config.recipes import load_recipe
from fastmae.probes.labelled import open_labelled
from fastmae.runs.folder import read_run
from fastmae.student.student import build_student

VISIBLE, UNMASKED = "FastMAE, visible_tiny_cpu", "distillation, visible_tiny_cpu unmasked"


def args(photos, out, *more):
    return ["bench", "accuracy", str(photos), "--out", str(out), "--device", "cpu", "--workers", "0", *more]


def runs_of(photos, out, *more):
    config = parse("bench accuracy", args(photos, out, *more)[2:])
    return AccuracyRuns(config, out / "accuracy.tokens", open_labelled(photos), methods(config))


@pytest.mark.slow
def test_all_methods_are_trained_and_measured_and_a_second_call_finds_the_results(
    photos, tmp_path, printed_json, error_line
):
    out = tmp_path / "acc"
    call = args(
        photos, out, *"--minutes 0.06 --recipe visible_tiny_cpu --fractions 1/5 --points 2 --seeds 2 --json".split()
    )
    assert run(call) == 0
    result = printed_json()
    curves = {name: list(rows) for name, rows in itertools.groupby(result["rows"], key=lambda row: row["method"])}
    assert list(curves) == [VISIBLE, UNMASKED, MAE]
    untrained = [{key: curve[0][key] for key in ("seconds", "epochs", "knn", "linear")} for curve in curves.values()]
    assert untrained == 3 * [untrained[0]]
    assert untrained[0]["seconds"] == untrained[0]["epochs"] == 0
    for curve in curves.values():
        assert 2 <= len(curve) <= (3 if curve is curves[MAE] else 2)  # two along MAE's run, if it has two steps
        assert all(0 <= row[key] <= 100 for row in curve for key in ("knn", "linear"))
        assert all({"knn_std", "linear_std"} <= row.keys() for row in curve)
    assert all(before["seconds"] < after["seconds"] for before, after in itertools.pairwise(curves[MAE]))
    assert list(result["ratios"]) == [VISIBLE, UNMASKED]
    for name in result["ratios"]:
        assert list(result["ratios"][name]) == ["knn", "linear"]
        assert result["ratios"][name]["knn"]["accuracy"] == max(row["knn"] for row in curves[MAE])
    assert result["tokenize_seconds"] > 0
    assert (out / "accuracy.html").read_text().count("<svg") == 2
    with Image.open(out / "accuracy.png") as figure:
        assert figure.width > 1000
    table = (out / "accuracy.md").read_text()
    assert all(f"| {name} |" in table for name in curves)

    assert len(list(out.glob("*/run.json"))) == 2 * 3
    assert read_run(out / "visible_tiny_cpu-unmasked-1of5-seed1")["options"]["mask_ratio"] == 0
    epochs = [read_run(out / f"visible_tiny_cpu-1of5-seed{seed}")["options"]["epochs"] for seed in (0, 1)]
    assert epochs[0] == epochs[1]

    assert run(call) == 0
    assert printed_json()["rows"] == result["rows"]
    refused = error_line([*call, "--points", "3", "--no-distillation"])
    assert "--points 2" in refused
    assert "--no-distillation" in refused


def test_all_runs_together_take_the_minutes(photos, tmp_path):
    runs = runs_of(photos, tmp_path, "--minutes", "9", "--fractions", "0.2,1/10", "--seeds", "2")
    assert [float(sum(method.fractions)) for method in runs.methods] == pytest.approx([0.3, 0.3, 0.3, 1])
    assert runs.mae_seconds == pytest.approx(9 * 60 / 2 / 1.9)
    assert "14 runs" in runs.announcement()
    assert "9:00 min" in runs.announcement()


def test_the_untrained_encoder_is_the_same_for_all_methods(photos, tmp_path):
    encoders = []
    for method in runs_of(photos, tmp_path).methods:
        config = parse("pretrain", ["store", "run", "--recipe", method.recipe])
        torch.manual_seed(0)
        encoders.append(build_student(config, 8, 12, 3).encoder.state_dict())
    assert all(torch.equal(encoders[0][name], other[name]) for other in encoders[1:] for name in encoders[0])


def test_distillation_is_the_first_recipe_without_its_mask_and_can_be_left_out(photos, tmp_path):
    both = runs_of(photos, tmp_path).methods
    assert [(method.recipe, dict(method.given)) for method in both] == [
        ("visible_tiny_cpu", {}),
        ("vit_tiny_cpu", {}),
        ("visible_tiny_cpu", {"mask_ratio": 0.0}),
        ("mae_tiny_cpu", {}),
    ]
    fewer = runs_of(photos, tmp_path, "--no-distillation", "--recipe", "vit_tiny_cpu").methods
    assert [method.recipe for method in fewer] == ["vit_tiny_cpu", "mae_tiny_cpu"]
    assert load_recipe("mae_tiny_cpu")["target"] == "pixels"


def test_an_untrained_encoder_is_measured_once(photos, tmp_path):
    (tmp_path / "untrained-seed0.json").write_text(json.dumps({"seconds": 0, "epoch": 0, "knn": 7, "linear": 8}))
    runs = runs_of(photos, tmp_path)
    assert runs._untrained(0)["knn"] == 7


@pytest.mark.parametrize(
    "options",
    [
        "--mae-recipe mae_300ep",
        "--minutes 0",
        "--seeds 0",
        "--recipe vit_tiny_cpu,vit_tiny_cpu",
        "--fractions 1/0",
        "--fractions 0",
        "--fractions 1/5,0.2",
        "--fractions 1/5,2",
        "--fractions fifth",
        "--fractions 1e-1000000000",
        f"--fractions {'1' * 5000}",
    ],
)
def test_what_can_not_be_compared_names_its_option(options, photos, tmp_path, error_line):
    assert options.split()[0] in error_line(args(photos, tmp_path / "acc", *options.split()))
    assert not (tmp_path / "acc").exists()

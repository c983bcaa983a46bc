"""`fastmae segment` on small drawn photos, with the encoder of a short pre-training run."""

import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.cli import run
from fastmae.evaluate.segmentation.data_check import check_data
from fastmae.evaluate.segmentation.datasets import TrainingCrops
from fastmae.evaluate.segmentation.layout import find_data
from fastmae.evaluate.segmentation.segment import Sizes, describe_setup
from fastmae.runs.checkpoint import load_checkpoint
from fastmae.runs.encoder import open_encoder
from fastmae.runs.folder import read_evaluations, read_run

SMALL = ["--device", "cpu", "--workers", "0", "--head-channels", "16"]
SMALL += ["--log-every", "1", "--pictures", "0", "--eval-every", "30"]


def segment(capsys, *args):
    """The command's JSON and its messages."""
    capsys.readouterr()
    assert run(["segment", *SMALL, *map(str, args), "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


@pytest.mark.slow
def test_it_learns_to_tell_the_shapes_apart_and_reports_data_sizes_and_classes(tiny_run, shapes, tmp_path, capsys):
    out = tmp_path / "segmented"
    options = ["--epochs", 40, "--lr", 3e-3, "--eval-every", 20, "--layer-decay", 1, "--pictures", 3]
    result, messages = segment(capsys, tiny_run, shapes, "--out", out, *options)
    assert result["miou"] > 70
    assert result["pixel_accuracy"] > 90
    assert list(result["classes"]) == ["ground", "disc", "square", "never"]
    assert result["classes"]["never"] is None
    ious = [iou for iou in result["classes"].values() if iou is not None]
    assert np.mean(ious) == pytest.approx(result["miou"], abs=0.01)
    assert (result["images"], result["train"], result["val"], result["epochs"]) == (4, 10, 4, 40)
    for fact in ("10 photos", "4 classes (classes.json)", "1, 1, 1, 2 of 2", "crops of 64 px", "patches of 16 px"):
        assert fact in messages
    lines_about_absence = [line for line in messages.splitlines() if line.endswith(": never")]
    assert len(lines_about_absence) == 2  # neither in the training masks nor in the validation masks

    assert Image.open(out / "predictions.png").size[0] > 800
    evaluations = read_evaluations(out)
    assert len(evaluations) == 2
    best = load_checkpoint(out / "best.pt")["evaluation"]["miou"]
    assert best == max(entry["miou"] for entry in evaluations)
    assert best == pytest.approx(result["best_miou"], abs=1e-3)
    described = read_run(out)
    classes = list(result["classes"])
    assert described["segmentation"] == {"crop": 64, "short_side": 64, "head_channels": 16, "classes": classes}
    assert described["options"]["layer_decay"] == 1


@pytest.mark.promise("labels")
def test_masks_of_0_128_and_255_are_described_before_the_start(tiny_run, shapes, change_mask):
    (shapes / "classes.json").unlink()
    for mask in (shapes / "masks").rglob("*.png"):
        change_mask(mask, lambda ids: np.choose(np.minimum(ids, 2), [0, 128, 255]).astype(np.uint8))
    data = find_data(shapes)
    summary, opened = check_data(data, channels=3), open_encoder(str(tiny_run))
    text = describe_setup(data, summary, opened, Sizes(64, 64, 16), "slide")
    (line,) = [line for line in text.splitlines() if "without a pixel" in line]
    assert ": 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20 and 107 more. " in line
    assert "Only 2 of the ids 0 to 128 occur: 0, 128; 255 is ignored (" in line
    assert line.endswith("names in classes.json say how many there are")


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tiny_run, shapes, tmp_path, capsys, monkeypatch):
    options = [tiny_run, shapes, "--epochs", 5, "--eval-every", 2, "--inference", "whole"]
    uninterrupted, _ = segment(capsys, *options, "--out", tmp_path / "uninterrupted")
    load, visits = TrainingCrops.__getitem__, []

    def interrupt_at_visit_20(self, visit):
        visits.append(visit)
        if len(visits) == 20:
            signal.raise_signal(signal.SIGTERM)
        return load(self, visit)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingCrops, "__getitem__", interrupt_at_visit_20)
        assert run(["segment", *SMALL, *map(str, options), "--out", str(tmp_path / "interrupted")]) == 130
    # The wait for the third batch was broken off.
    assert load_checkpoint(tmp_path / "interrupted" / "checkpoint.pt")["step"] == 2
    resumed, messages = segment(capsys, *options, "--out", tmp_path / "interrupted")
    assert "step 2" in messages
    for name in ("miou", "pixel_accuracy", "classes", "loss", "best_miou", "steps"):
        assert resumed[name] == uninterrupted[name]
    weights, resumed_weights = (
        load_checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in ("uninterrupted", "interrupted")
    )
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_it_starts_from_the_runs_weights_or_at_random(tiny_run, shapes, tmp_path, capsys):
    weights = {}
    for name, encoder, flags in (
        ("run", tiny_run, []),
        ("random", tiny_run, ["--no-pretrained"]),
        ("timm", "timm/vit_tiny_patch16_224", ["--no-pretrained"]),
    ):
        # At this rate the weights stay where they started.
        segment(capsys, encoder, shapes, "--out", tmp_path / name, "--epochs", 1, "--lr", 1e-12, *flags)
        weights[name] = load_checkpoint(tmp_path / name / "checkpoint.pt")["model"]
    qkv = "encoder.blocks.0.attn.qkv.weight"
    pretrained = load_checkpoint(tiny_run / "checkpoint.pt")["model"][qkv]
    torch.testing.assert_close(weights["run"][qkv], pretrained)
    assert not torch.allclose(weights["random"][qkv], pretrained)
    assert sum(name.endswith("attn.qkv.weight") for name in weights["timm"]) == 12


def test_other_commands_can_open_the_trained_encoder(tiny_run, shapes, tmp_path, capsys):
    out = tmp_path / "segmented"
    segment(capsys, tiny_run, shapes, "--out", out, "--epochs", 1)
    opened = open_encoder(str(out), 32)
    assert (opened.network(torch.zeros(1, 3, 32, 32)).shape, opened.patch_size) == ((1, 64), 16)
    trained = load_checkpoint(out / "checkpoint.pt")["model"]["encoder.blocks.1.mlp.fc1.weight"]
    torch.testing.assert_close(opened.network.blocks[1].mlp.fc1.weight.detach(), trained)


def test_ade20ks_layout_gives_the_same_figures_as_the_plain_one(tiny_run, shapes, shapes_as_ade, tmp_path, capsys):
    (shapes_as_ade / "objectInfo150.txt").write_text("Idx\tName\n1\tground\n2\tdisc\n3\tsquare\n")
    (shapes / "classes.json").write_text('["ground", "disc", "square"]')
    options = ["--epochs", 2, "--crop-size", 48, "--short-side", 0]  # windows smaller than the photos
    ade, messages = segment(capsys, tiny_run, shapes_as_ade, "--out", tmp_path / "ade_run", *options)
    assert "3 classes (objectInfo150.txt)" in messages
    assert "crops of 48 px" in messages
    plain, _ = segment(capsys, tiny_run, shapes, "--out", tmp_path / "plain_run", *options)
    assert ade["classes"] == plain["classes"]
    assert ade["loss"] == plain["loss"]


BAD_OPTIONS = [
    ("--crop-size 50", "take 48"),
    ("--crop-size 16", "take 32"),
    ("--batch-size 4 --micro-batch 1", "batch norm"),
]


@pytest.mark.parametrize(("flags", "reason"), BAD_OPTIONS)
def test_options_that_do_not_fit_the_network_are_refused_by_name(tiny_run, shapes, tmp_path, capsys, flags, reason):
    capsys.readouterr()
    out = tmp_path / "out"
    assert run(["segment", str(tiny_run), str(shapes), "--out", str(out), "--device", "cpu", *flags.split()]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert flags.split()[0] in message
    assert reason in message
    assert not out.exists()


def test_without_out_the_command_is_refused(tiny_run, shapes, capsys):
    capsys.readouterr()
    assert run(["segment", str(tiny_run), str(shapes), "--device", "cpu"]) == 2
    assert "--out" in capsys.readouterr().err


def test_bad_data_end_the_command_before_anything_is_written(tiny_run, shapes, tmp_path, capsys):
    capsys.readouterr()
    (shapes / "masks" / "train" / "03.png").unlink()
    assert run(["segment", str(tiny_run), str(shapes), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "03.jpg" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_photo_found_damaged_during_training_is_named_without_a_traceback(tiny_run, shapes, tmp_path, capsys):
    photo = shapes / "images" / "train" / "03.jpg"
    photo.write_bytes(photo.read_bytes()[:700])
    capsys.readouterr()
    assert run(["segment", str(tiny_run), str(shapes), "--out", str(tmp_path / "out"), "--epochs", "1", *SMALL]) == 2
    err = capsys.readouterr().err
    assert "03.jpg: damaged" in err
    assert "Traceback" not in err


def test_a_network_with_maps_of_four_strides_is_trained_on_them(shapes, tmp_path, capsys):
    options = ["--no-pretrained", "--epochs", 1, "--batch-size", 4, "--inference", "whole"]
    out = tmp_path / "segmented"
    result, messages = segment(capsys, "timm/resnet10t", shapes, "--out", out, *options)
    assert 0 <= result["miou"] <= 100
    assert "maps of strides 4, 8, 16, 32" in messages
    opened = open_encoder(str(out))
    assert (opened.architecture, opened.is_vit) == ("resnet10t", False)


@pytest.mark.parametrize("name", ["timm/vit_tiny_r_s16_p8_224", "timm/hiera_tiny_224"])
def test_a_network_without_such_maps_or_of_one_size_is_refused(name, shapes, tmp_path, error_line):
    line = error_line(["segment", *SMALL, name, str(shapes), "--out", str(tmp_path / "out"), "--no-pretrained"])
    assert name in line

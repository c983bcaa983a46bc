"""The command on small drawn photos, from a run that was pre-trained for a moment."""

import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.cli import run
from fastmae.evaluate.segmentation.datasets import TrainingCrops
from fastmae.runs.checkpoint import load_checkpoint
from fastmae.runs.encoder import open_encoder
from fastmae.runs.folder import read_evaluations, read_run

SMALL = [
    "--device",
    "cpu",
    "--workers",
    "0",
    "--head-channels",
    "16",
    "--log-every",
    "1",
    "--pictures",
    "0",
    "--eval-every",
    "30",
]


def segment(capsys, *args):
    """The command's JSON and what it told besides."""
    capsys.readouterr()
    assert run(["segment", *SMALL, *map(str, args), "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


def test_it_learns_to_tell_the_shapes_and_says_what_it_did(tiny_run, shapes, tmp_path, capsys):
    out = tmp_path / "segmented"
    options = ["--epochs", 40, "--lr", 3e-3, "--eval-every", 20, "--layer-decay", 1, "--pictures", 3]
    result, told = segment(capsys, tiny_run, shapes, "--out", out, *options)
    assert result["miou"] > 70
    assert result["pixel_accuracy"] > 90
    assert list(result["classes"]) == ["ground", "disc", "square", "never"]
    assert result["classes"]["never"] is None
    assert np.mean([iou for iou in result["classes"].values() if iou is not None]) == pytest.approx(
        result["miou"], abs=0.01
    )
    assert (result["images"], result["train"], result["val"], result["epochs"]) == (4, 10, 4, 40)
    assert "10 photos to train on, 4 to measure; 4 classes (classes.json); all masks read" in told
    assert "no training mask that was read holds: never" in told
    assert (
        "after blocks 1, 1, 1, 2 of 2; crops of 64 px slid over val's photos; shorter sides brought to 64 px; patch 16"
        in told
    )
    assert "not in the validation masks, so not in the mean: never" in told

    assert Image.open(out / "predictions.png").size[0] > 800
    assert len(read_evaluations(out)) == 2
    best = load_checkpoint(out / "best.pt")
    assert (
        best["evaluation"]["miou"]
        == max(entry["miou"] for entry in read_evaluations(out))
        == pytest.approx(result["best_miou"], abs=1e-3)
    )
    described = read_run(out)
    assert described["segmentation"] == {
        "crop": 64,
        "short_side": 64,
        "head_channels": 16,
        "classes": list(result["classes"]),
    }
    assert described["options"]["layer_decay"] == 1


def test_an_interrupted_run_ends_as_if_nothing_had_happened(tiny_run, shapes, tmp_path, capsys, monkeypatch):
    options = [tiny_run, shapes, "--epochs", 5, "--eval-every", 2, "--inference", "whole"]
    straight, _ = segment(capsys, *options, "--out", tmp_path / "straight")
    load, visits = TrainingCrops.__getitem__, []

    def interrupting(self, visit):
        visits.append(visit)
        if len(visits) == 20:
            signal.raise_signal(signal.SIGTERM)
        return load(self, visit)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingCrops, "__getitem__", interrupting)
        assert run(["segment", *SMALL, *map(str, options), "--out", str(tmp_path / "stopped")]) == 130
    assert load_checkpoint(tmp_path / "stopped" / "checkpoint.pt")["step"] == 3
    resumed, told = segment(capsys, *options, "--out", tmp_path / "stopped")
    assert "from step 3" in told
    same = ("miou", "pixel_accuracy", "classes", "loss", "best_miou", "steps")
    assert {name: resumed[name] for name in same} == {name: straight[name] for name in same}
    ended = [load_checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in ("straight", "stopped")]
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


def test_it_starts_from_the_runs_weights_or_at_random(tiny_run, shapes, tmp_path, capsys):
    first = {}
    for name, flags in {"run": [], "random": ["--no-pretrained"], "timm": ["--no-pretrained"]}.items():
        spec = "timm/vit_tiny_patch16_224" if name == "timm" else tiny_run
        # The rate is so small that the weights stay where they started.
        segment(capsys, spec, shapes, "--out", tmp_path / name, "--epochs", 1, "--lr", 1e-12, *flags)
        first[name] = load_checkpoint(tmp_path / name / "checkpoint.pt")["model"]
    trained = load_checkpoint(tiny_run / "checkpoint.pt")["model"]["encoder.blocks.0.attn.qkv.weight"]
    torch.testing.assert_close(first["run"]["encoder.blocks.0.attn.qkv.weight"], trained)
    assert not torch.allclose(first["random"]["encoder.blocks.0.attn.qkv.weight"], trained)
    assert sum(name.endswith("attn.qkv.weight") for name in first["timm"]) == 12


def test_what_was_trained_is_an_encoder_for_other_commands(tiny_run, shapes, tmp_path, capsys):
    out = tmp_path / "segmented"
    segment(capsys, tiny_run, shapes, "--out", out, "--epochs", 1)
    opened = open_encoder(str(out), 32)
    assert (opened.network(torch.zeros(1, 3, 32, 32)).shape, opened.patch_size) == ((1, 64), 16)
    held = load_checkpoint(out / "checkpoint.pt")["model"]
    torch.testing.assert_close(
        opened.network.blocks[1].mlp.fc1.weight.detach(), held["encoder.blocks.1.mlp.fc1.weight"]
    )


def test_ade20ks_own_layout_and_windows_smaller_than_the_photos(tiny_run, shapes, tmp_path, capsys):
    root = tmp_path / "ade"
    for split, own in (("train", "training"), ("val", "validation")):
        (root / "images").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / own).mkdir(parents=True)
        (root / "images" / own).symlink_to(shapes / "images" / split)
        for mask in (shapes / "masks" / split).iterdir():
            ids = np.array(Image.open(mask)).astype(int)
            Image.fromarray(np.where(ids == 255, 0, ids + 1).astype(np.uint8)).save(
                root / "annotations" / own / mask.name
            )
    (root / "objectInfo150.txt").write_text("Idx\tName\n1\tground\n2\tdisc\n3\tsquare\n")
    options = ["--epochs", 2, "--crop-size", 48, "--short-side", 0]
    own, told = segment(capsys, tiny_run, root, "--out", tmp_path / "own", *options)
    assert "3 classes (objectInfo150.txt)" in told
    assert "crops of 48 px slid over val's photos; photos at their own size" in told
    (shapes / "classes.json").write_text('["ground", "disc", "square"]')
    plain, _ = segment(capsys, tiny_run, shapes, "--out", tmp_path / "plain", *options)
    assert own["classes"] == plain["classes"]
    assert own["loss"] == plain["loss"]


BAD_OPTIONS = {
    ("--crop-size", "50"): "--crop-size 50: not a multiple of the patch of 16 px; take 48",
    ("--crop-size", "16"): "--crop-size 16: not a multiple of the patch of 16 px; take 32",
    ("--crop-size", "0"): "--crop-size 0: give 1 or more",
    ("--short-side", "-1"): "--short-side -1: give 0 or more",
    ("--head-channels", "0"): "--head-channels 0: give 1 or more",
    (
        "--batch-size",
        "4",
        "--micro-batch",
        "1",
    ): "UperNet's batch norm needs two images or more in each forward of a device",
}


@pytest.mark.parametrize(("flags", "line"), BAD_OPTIONS.items())
def test_options_that_cannot_be_are_refused_in_one_line(tiny_run, shapes, tmp_path, capsys, flags, line):
    capsys.readouterr()
    assert run(["segment", str(tiny_run), str(shapes), "--out", str(tmp_path / "out"), "--device", "cpu", *flags]) == 2
    err = capsys.readouterr().err.splitlines()
    assert line in err[-1]
    assert not (tmp_path / "out").exists()


def test_bad_data_end_the_command_before_anything_is_written(tiny_run, shapes, tmp_path, capsys):
    capsys.readouterr()
    assert run(["segment", str(tiny_run), str(shapes), "--device", "cpu"]) == 2
    assert "give --out DIR" in capsys.readouterr().err
    (shapes / "masks" / "train" / "03.png").unlink()
    assert run(["segment", str(tiny_run), str(shapes), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "03.jpg: has no mask" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_photo_that_turns_out_damaged_in_training_is_named(tiny_run, shapes, tmp_path, capsys):
    photo = shapes / "images" / "train" / "03.jpg"
    photo.write_bytes(photo.read_bytes()[:700])
    capsys.readouterr()
    assert run(["segment", str(tiny_run), str(shapes), "--out", str(tmp_path / "out"), "--epochs", "1", *SMALL]) == 2
    err = capsys.readouterr().err
    assert "03.jpg: damaged" in err
    assert "remove it and its mask from the data" in err
    assert "Traceback" not in err

"""Fine-tuning: the classifier against its formula, the mixing, and the real command from start over interruption to its figures."""

import json
import os
import signal
import subprocess
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastmae.cli import run
from fastmae.evaluate.classification import most_confused
from fastmae.evaluate.finetune import ClassifierStep, build_classifier
from fastmae.evaluate.transforms import LabelledImages, full_augmentation
from fastmae.probes.labelled import open_labelled
from fastmae.runs.checkpoint import load_checkpoint
from fastmae.runs.encoder import open_encoder
from fastmae.runs.folder import read_evaluations, read_metrics

SHORT = [
    "--batch-size",
    "8",
    "--workers",
    "0",
    "--device",
    "cpu",
    "--log-every",
    "1",
    "--lr",
    "0.003",
    "--layer-decay",
    "0.9",
    "--json",
]


def test_the_classifier_is_mean_of_patches_norm_and_a_line(tiny_run):
    opened = open_encoder(str(tiny_run))
    network, _ = build_classifier(opened, 7, "mean", drop_path=0.0)
    torch.nn.init.normal_(network.head.weight)
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        patches = opened.network.forward_intermediates(images, [1], output_fmt="NLC", intermediates_only=True)[0]
        expected = F.linear(F.layer_norm(patches.mean(1), (64,), eps=1e-6), network.head.weight)
        assert torch.allclose(network.eval()(images), expected, atol=1e-5)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_the_class_token_keeps_its_norm(tiny_run):
    opened = open_encoder(str(tiny_run))
    network, _ = build_classifier(opened, 7, "class", drop_path=0.0)
    assert torch.equal(network.norm.weight, opened.network.norm.weight)
    assert network.head.weight.std() < 1e-4


def test_smooth_labels_and_mixed_images_against_the_formula():
    scores = torch.randn(4, 5)
    labels = torch.tensor([0, 1, 2, 4])
    loss = ClassifierStep(None, 0.1)(lambda _: scores, (torch.zeros(4, 1), labels))["loss"]
    targets = F.one_hot(labels, 5) * 0.9 + 0.1 / 5
    assert loss.item() == pytest.approx(-(targets * scores.log_softmax(1)).sum(1).mean().item(), rel=1e-5)


def test_the_strongest_augmentation_draws_the_same_for_a_visit_and_never_fails(photos, tiny_run):
    data = open_labelled(photos)
    pictures = LabelledImages(
        data.train, data.train_labels, 3, full_augmentation(open_encoder(str(tiny_run)), "rand-m10-mstd2-inc1", 0.5)
    )
    for epoch in range(20):
        images, label = pictures[epoch, epoch]
        assert images.shape == (3, 64, 64)
        assert label == data.train_labels[epoch]
        assert torch.equal(images, pictures[epoch, epoch][0])
    assert not torch.equal(pictures[0, 0][0], pictures[1, 0][0])


def test_the_most_confused_are_named():
    counts = torch.tensor([[5, 3, 0], [0, 9, 1], [0, 0, 2]])
    assert most_confused(counts, ["a", "b", "c"]) == ["b for a (3)", "c for b (1)"]


def tune(capsys, run_folder, photos, out, *options):
    code = run(["finetune", str(run_folder), str(photos), "--out", str(out), *SHORT, *options])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]) if captured.out else None, captured.err


def test_fine_tuning_learns_draws_and_goes_on_where_it_was_stopped(tiny_run, photos, tmp_path, capsys):
    plain = ["--augment", "crop", "--smoothing", "0", "--epochs", "12", "--eval-every", "4"]
    code, result, err = tune(capsys, tiny_run, photos, tmp_path / "a", *plain)
    assert code == 0, err
    assert "30 images, 12 epochs = 45 steps of 8" in err
    assert result["top1"] >= 80  # a temple and a flower
    assert (result["top5"], result["epochs"], result["steps"]) == (100.0, 12, 45)
    evaluations = read_evaluations(tmp_path / "a")
    assert [entry["step"] for entry in evaluations] == [15, 30, 45]
    assert result["best_top1"] == max(entry["top1"] for entry in evaluations)
    assert load_checkpoint(tmp_path / "a" / "best.pt")["evaluation"]["top1"] == result["best_top1"]
    with Image.open(tmp_path / "a" / "confusion.png") as picture:
        assert min(picture.size) > 300
    # again, stopped on the way and continued: the same losses, the same figures
    stopper = threading.Thread(target=stop_after_steps, args=(tmp_path / "b", 5))
    stopper.start()
    assert tune(capsys, tiny_run, photos, tmp_path / "b", *plain)[0] == 130
    stopper.join()
    code, again, _ = tune(capsys, tiny_run, photos, tmp_path / "b", *plain)
    assert (code, again["top1"], again["best_top1"]) == (0, result["top1"], result["best_top1"])
    losses = [[entry["loss"] for entry in read_metrics(tmp_path / name)] for name in ("a", "b")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def stop_after_steps(folder, steps):
    """A scheduler's signal, once so many are logged."""
    while len(read_metrics(folder)) < steps:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_fine_tuned_run_is_an_encoder_again(tiny_run, photos, tmp_path, capsys):
    options = ["--epochs", "1", "--image-size", "96", "--ema", "0.9", "--mixup", "0.8", "--micro-batch", "4"]
    code, _, err = tune(capsys, tiny_run, photos, tmp_path / "ft", *options)
    assert code == 0, err
    opened = open_encoder(str(tmp_path / "ft"))
    assert (opened.image_size, opened.network.num_classes) == (96, 0)
    saved = load_checkpoint(tmp_path / "ft" / "checkpoint.pt")["ema"]
    assert torch.equal(opened.network.blocks[0].mlp.fc1.weight, saved["blocks.0.mlp.fc1.weight"])
    assert run(["knn", str(tmp_path / "ft"), str(photos), "--workers", "0"]) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--batch-size", "7"], "pair the images; give an even one"),
        (["--rand-augment", "strong"], "not timm's word"),
        (["--image-size", "50"], "not a multiple of the patch of 16"),
        (["--erasing", "2"], "--erasing 2.0"),
        (["--mixup", "-1"], "--mixup -1.0"),
    ],
)
def test_options_that_do_not_go_are_one_line(options, says, tiny_run, photos, tmp_path, capsys):
    code, _, err = tune(capsys, tiny_run, photos, tmp_path / "ft", *options)
    assert code == 2
    assert says in err.splitlines()[-1]
    assert not (tmp_path / "ft").exists()


def test_data_that_can_not_be_learnt_from_are_named_before_the_start(tiny_run, photos, tmp_path, capsys):
    data = tmp_path / "data"
    for split in ("train", "val"):
        (data / split).mkdir(parents=True)
        (data / split / "china").symlink_to(photos / split / "china")
    code, _, err = tune(capsys, tiny_run, data, tmp_path / "ft")
    assert (code, "one class only ('china')" in err) == (2, True)
    (data / "train" / "empty").mkdir()
    code, _, err = tune(capsys, tiny_run, data, tmp_path / "ft")
    assert (code, "empty: no image in this class folder" in err) == (2, True)
    code, _, err = tune(capsys, tiny_run, tmp_path / "nowhere", tmp_path / "ft")
    assert (code, "no folder 'train'" in err) == (2, True)
    assert run(["finetune", str(tiny_run), str(photos)]) == 2
    assert "give --out DIR" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_and_measure_as_one_does(tiny_run, photos, tmp_path, capsys, fastmae_command):
    plain = ["--augment", "crop", "--drop-path", "0", "--epochs", "2", "--eval-every", "1", *SHORT]
    assert run(["finetune", str(tiny_run), str(photos), "--out", str(tmp_path / "one"), *plain]) == 0
    two = [
        *fastmae_command,
        "finetune",
        str(tiny_run),
        str(photos),
        "--out",
        str(tmp_path / "two"),
        *plain,
        "--devices",
        "2",
    ]
    done = subprocess.run(two, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1  # one of them speaks
    one, other = (read_evaluations(tmp_path / name) for name in ("one", "two"))
    assert [entry["top1"] for entry in one] == [entry["top1"] for entry in other]
    assert [entry["val_loss"] for entry in one] == pytest.approx([entry["val_loss"] for entry in other], rel=1e-4)
    losses = [[entry["loss"] for entry in read_metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

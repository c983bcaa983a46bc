"""Fine-tuning: classifier and loss against their formulas; the command, also interrupted and in two processes."""

import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup

from fastmae.cli import run
from fastmae.errors import InputError
from fastmae.evaluate.finetune import ClassifierStep, build_classifier
from fastmae.runs.checkpoint import load_checkpoint
from fastmae.runs.encoder import open_encoder
from fastmae.runs.folder import read_evaluations, read_metrics

SHORT = "--batch-size 8 --workers 0 --device cpu --log-every 1 --lr 0.003 --layer-decay 0.9 --json".split()
PLAIN = ["--augment", "crop", "--smoothing", "0"]


def test_the_classifier_is_the_mean_of_the_patches_a_norm_and_a_linear_layer(tiny_run):
    opened = open_encoder(str(tiny_run))
    network, _ = build_classifier(opened, 7, "mean", drop_path=0.0)
    torch.nn.init.normal_(network.head.weight)
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        patches = opened.network.forward_intermediates(images, [1], output_fmt="NLC", intermediates_only=True)[0]
        expected = F.linear(F.layer_norm(patches.mean(1), (64,), eps=1e-6), network.head.weight)
        assert torch.allclose(network.eval()(images), expected, atol=1e-5)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_classifier_on_the_class_token_keeps_the_encoders_norm(tiny_run):
    opened = open_encoder(str(tiny_run))
    network, _ = build_classifier(opened, 7, "class", drop_path=0.0)
    assert torch.equal(network.norm.weight, opened.network.norm.weight)
    assert network.head.weight.std() < 1e-4


def test_a_class_token_that_no_norm_follows_is_refused(tiny_run):
    opened = open_encoder(str(tiny_run))
    classifier, arguments = build_classifier(opened, 7, "mean", drop_path=0.0)
    with pytest.raises(InputError, match="--pool class"):
        build_classifier(replace(opened, network=classifier, arguments=arguments), 3, "class", drop_path=0.0)


def test_the_loss_with_smoothed_labels_equals_the_formula():
    scores, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 4])
    loss = ClassifierStep(None, 0.1)(lambda _: scores, (torch.zeros(4, 1), labels))["loss"]
    targets = F.one_hot(labels, 5) * 0.9 + 0.1 / 5
    assert loss.item() == pytest.approx(-(targets * scores.log_softmax(1)).sum(1).mean().item(), rel=1e-5)


def test_mixed_images_are_compared_with_labels_mixed_in_the_same_proportion():
    scores, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 4])
    images = F.one_hot(labels, 5).float()[:, :, None, None]  # mixing these images mixes their one-hot labels
    mixed_images = []

    def model(mixed):
        mixed_images.append(mixed)
        return scores

    step = ClassifierStep(Mixup(mixup_alpha=0.8, cutmix_alpha=0.0, label_smoothing=0.0, num_classes=5), 0.0)
    loss = step(model, (images, labels))["loss"]
    targets = mixed_images[0][:, :, 0, 0]
    assert not torch.equal(targets, F.one_hot(labels, 5).float())
    assert loss.item() == pytest.approx(-(targets * scores.log_softmax(1)).sum(1).mean().item(), rel=1e-5)


@pytest.fixture
def finetune(tiny_run, photos, capsys):
    """(folder, options) -> exit code, JSON and standard error of a short `finetune`."""

    def call(out, *options):
        code = run(["finetune", str(tiny_run), str(photos), "--out", str(out), *SHORT, *options])
        captured = capsys.readouterr()
        return code, json.loads(captured.out.splitlines()[-1]) if captured.out else None, captured.err

    return call


def send_sigterm_after(folder, steps):
    while len(read_metrics(folder)) < steps:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def test_fine_tuning_learns_and_an_interrupted_run_reaches_the_same_figures(finetune, tmp_path):
    options = [*PLAIN, "--epochs", "12", "--eval-every", "4"]
    code, result, err = finetune(tmp_path / "a", *options)
    assert code == 0, err
    assert result["top1"] >= 80  # a temple and a flower
    assert (result["top5"], result["epochs"], result["steps"]) == (100.0, 12, 45)
    evaluations = read_evaluations(tmp_path / "a")
    assert [entry["step"] for entry in evaluations] == [15, 30, 45]
    assert result["best_top1"] == max(entry["top1"] for entry in evaluations)
    assert load_checkpoint(tmp_path / "a" / "best.pt")["evaluation"]["top1"] == result["best_top1"]
    with Image.open(tmp_path / "a" / "confusion.png") as picture:
        assert min(picture.size) > 300

    stopper = threading.Thread(target=send_sigterm_after, args=(tmp_path / "b", 5))
    stopper.start()
    assert finetune(tmp_path / "b", *options)[0] == 130
    stopper.join()
    code, continued, _ = finetune(tmp_path / "b", *options)
    assert (code, continued["top1"], continued["best_top1"]) == (0, result["top1"], result["best_top1"])
    losses = [[entry["loss"] for entry in read_metrics(tmp_path / name)] for name in ("a", "b")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_fine_tuned_run_can_be_opened_as_an_encoder(finetune, photos, tmp_path):
    options = "--epochs 1 --image-size 96 --ema 0.9 --mixup 0.8 --micro-batch 4".split()
    code, _, err = finetune(tmp_path / "ft", *options)
    assert code == 0, err
    opened = open_encoder(str(tmp_path / "ft"))
    assert (opened.image_size, opened.network.num_classes) == (96, 0)
    average = load_checkpoint(tmp_path / "ft" / "checkpoint.pt")["ema"]
    assert torch.equal(opened.network.blocks[0].mlp.fc1.weight, average["blocks.0.mlp.fc1.weight"])
    assert run(["knn", str(tmp_path / "ft"), str(photos), "--workers", "0"]) == 0


@pytest.mark.parametrize(
    "option", ["--batch-size 7", "--rand-augment strong", "--rand-augment rand-n1000000", "--image-size 50"]
)
def test_an_option_that_does_not_fit_is_named_before_the_run_is_created(option, finetune, tmp_path):
    code, _, err = finetune(tmp_path / "ft", *option.split())
    assert code == 2
    assert option in err.splitlines()[-1]
    assert not (tmp_path / "ft").exists()


def test_fine_tuning_needs_a_folder_for_the_run(tiny_run, photos, error_line):
    assert "--out" in error_line(["finetune", str(tiny_run), str(photos)])


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one_does(finetune, tiny_run, photos, tmp_path, fastmae_command):
    options = [*PLAIN, "--drop-path", "0", "--epochs", "2", "--eval-every", "1"]
    assert finetune(tmp_path / "one", *options)[0] == 0
    args = ["finetune", str(tiny_run), str(photos), "--out", str(tmp_path / "two"), *SHORT, *options, "--devices", "2"]
    done = subprocess.run([*fastmae_command, *args], capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1  # only the first process prints
    one, two = (read_evaluations(tmp_path / name) for name in ("one", "two"))
    assert [entry["top1"] for entry in one] == [entry["top1"] for entry in two]
    assert [entry["val_loss"] for entry in one] == pytest.approx([entry["val_loss"] for entry in two], rel=1e-4)
    losses = [[entry["loss"] for entry in read_metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

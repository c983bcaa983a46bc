"""Students that are not plain ViTs, from pre-training through all commands that take a run."""

import json
import subprocess

import numpy as np
import pytest
import safetensors.numpy
import timm
import torch

import fastmae
from fastmae.cli import run
from fastmae.runs.folder import read_evaluations, read_metrics

SHORT = "--mask-ratio 0 --image-size 64 --epochs 2 --batch-size 8 --warmup-epochs 1 --base-lr 0.02 --log-every 1"
CPU = ["--device", "cpu", "--workers", "0"]
NETWORKS = ("resnet10t", "convnext_atto", "vit_tiny_r_s16_p8_224")


@pytest.fixture(scope="module")
def network_runs(vit_store, tmp_path_factory):
    """timm's name -> a run of two epochs."""
    runs = {name: tmp_path_factory.mktemp("networks") / name for name in NETWORKS}
    for name, folder in runs.items():
        args = ["pretrain", str(vit_store), str(folder), "--encoder", f"timm/{name}", *SHORT.split(), *CPU]
        assert run(args) == 0
    return runs


@pytest.fixture(params=NETWORKS)
def network_run(request, network_runs):
    return network_runs[request.param]


def test_a_network_learns_and_its_encoder_is_timms_own(network_run):
    losses = [entry["loss"] for entry in read_metrics(network_run)]
    assert losses[-1] < losses[0]
    encoder = fastmae.load_encoder(network_run)
    assert type(encoder).__module__.startswith("timm.")
    assert not [name for name, module in encoder.named_modules() if type(module).__module__.startswith("fastmae")]


def test_the_exported_network_gives_timm_the_embeddings_of_the_run(network_run, photos, tmp_path, printed_json):
    exported = tmp_path / "exported"
    assert run(["export", str(network_run), str(exported)]) == 0
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    network = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(network(images), fastmae.load_encoder(network_run)(images))
    accuracies = []
    for source in (network_run, exported):
        assert run(["knn", str(source), str(photos), *CPU, "--json"]) == 0
        accuracies.append(printed_json())
    assert accuracies[0] == accuracies[1]
    assert accuracies[0]["dim"] == network.num_features


def test_features_may_hold_the_map_and_the_embedding_is_its_mean(network_run, photos, tmp_path):
    file = tmp_path / "features.safetensors"
    assert run(["features", str(network_run), str(photos / "val"), str(file), "--dense", *CPU]) == 0
    tensors = safetensors.numpy.load_file(file)
    assert tensors["dense"].shape[1:3] == (2, 2)
    np.testing.assert_allclose(tensors["dense"].mean((1, 2)), tensors["embeddings"], atol=1e-5)


def test_features_of_an_earlier_stage_have_its_width_and_grid(network_run, photos, tmp_path, printed_json):
    file = tmp_path / "features.safetensors"
    args = ["features", str(network_run), str(photos / "val"), str(file), "--block", "1", "--dense", *CPU, "--json"]
    assert run(args) == 0
    result = printed_json()
    features = safetensors.numpy.load_file(file)
    stages = fastmae.load_encoder(network_run).forward_intermediates(torch.zeros(1, 3, 64, 64), intermediates_only=True)
    assert stages[1].shape[1:] == (result["dim"], result["grid"], result["grid"])
    assert features["embeddings"].shape == (10, result["dim"])
    assert features["dense"].shape == (10, result["grid"], result["grid"], result["dim"])
    np.testing.assert_allclose(features["dense"].mean((1, 2)), features["embeddings"], atol=1e-4)


def test_a_fine_tuned_network_is_measured_and_exported_with_its_classes(network_run, photos, tmp_path, printed_json):
    tuned, exported = tmp_path / "tuned", tmp_path / "exported"
    options = "--epochs 1 --batch-size 8 --image-size 96 --json".split()
    assert run(["finetune", str(network_run), str(photos), "--out", str(tuned), *options, *CPU]) == 0
    assert printed_json()["top1"] >= 0
    assert run(["knn", str(tuned), str(photos), *CPU, "--json"]) == 0
    assert printed_json()["image_size"] == 96
    assert run(["export", str(tuned), str(exported), "--classifier"]) == 0
    network = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 96, 96)).shape == (1, 2)


def test_a_run_starts_from_the_weights_of_another_and_continues(network_run, vit_store, tmp_path):
    encoder = json.loads((network_run / "run.json").read_text())["options"]["encoder"]
    args = ["pretrain", str(vit_store), str(tmp_path / "run"), "--encoder", encoder, *SHORT.split(), *CPU]
    assert run([*args, "--init", str(network_run), "--base-lr", "1e-9"]) == 0
    given, after = (fastmae.load_encoder(folder).state_dict() for folder in (network_run, tmp_path / "run"))
    weights = [name for name in given if "running" not in name and "num_batches" not in name]
    assert max((given[name] - after[name]).abs().max() for name in weights) < 1e-6


def test_the_report_and_knn_on_the_way_take_a_network(network_runs, vit_store, tmp_path):
    assert run(["report", str(network_runs["resnet10t"]), "--images", "2", "--out", str(tmp_path / "r.html")]) == 0
    assert "no plain ViT" in (tmp_path / "r.html").read_text()
    args = ["pretrain", str(vit_store), str(tmp_path / "run"), "--encoder", "resnet10t", *SHORT.split(), *CPU]
    assert run([*args, "--knn-every", "1", "--no-all-layers"]) == 0
    assert [0 <= entry["knn_top1"] <= 100 for entry in read_evaluations(tmp_path / "run")] == [True, True]


@pytest.mark.slow
def test_two_processes_train_a_network_whose_head_is_not_trained(vit_store, tmp_path, fastmae_command):
    args = ["pretrain", str(vit_store), str(tmp_path / "run"), "--encoder", "timm/mobilenetv3_small_050"]
    assert (
        subprocess.run([*fastmae_command, *args, *SHORT.split(), *CPU, "--devices", "2"], check=False).returncode == 0
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--mask-ratio 0.5", "--mask-ratio 0"),
        ("--mask-ratio 0 --decoder-depth 1", "--decoder-depth 0"),
        ("--mask-ratio 0 --encoder-depth 2", "--encoder-depth"),
    ],
)
def test_what_does_not_fit_a_network_is_refused_before_the_run_is_created(
    options, named, vit_store, tmp_path, error_line
):
    args = ["pretrain", str(vit_store), str(tmp_path / "run"), "--encoder", "timm/resnet10t", *CPU]
    assert named in error_line([*args, "--image-size", "64", *options.split()])
    assert not (tmp_path / "run").exists()


def test_weights_of_another_network_are_refused(network_runs, vit_store, tmp_path, error_line):
    args = ["pretrain", str(vit_store), str(tmp_path / "run"), "--encoder", "timm/resnet10t", *SHORT.split(), *CPU]
    assert "--init" in error_line([*args, "--init", str(network_runs["convnext_atto"])])
    assert not (tmp_path / "run").exists()


def test_only_a_vit_is_exported_for_transformers(network_runs, tmp_path, error_line):
    args = ["export", str(network_runs["resnet10t"]), str(tmp_path / "out"), "--format", "transformers"]
    assert "--format timm or onnx" in error_line(args)

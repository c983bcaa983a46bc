"""The linear probe: LARS against its formula, and the real command in its three ways."""

import json

import pytest
import torch

from fastmae.cli import run
from fastmae.evaluate.linear import FeatureBatches, build_probe, lars


def test_lars_scales_weights_by_trust_and_leaves_biases_alone():
    """MAE's: for weights v <- m v + 0.001 |w| / |g| g, for biases v <- m v + g; w <- w - lr v."""
    torch.manual_seed(0)
    weight, bias = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(3))
    optimizer = lars([{"params": [weight], "always_adapt": True}, {"params": [bias], "always_adapt": False}], lr=2.0)
    w, b, v_w, v_b = weight.detach().clone(), bias.detach().clone(), torch.zeros(3, 4), torch.zeros(3)
    for _ in range(3):
        weight.grad, bias.grad = torch.randn(3, 4), torch.randn(3)
        v_w = 0.9 * v_w + 0.001 * w.norm() / weight.grad.norm() * weight.grad
        v_b = 0.9 * v_b + bias.grad
        w, b = w - 2.0 * v_w, b - 2.0 * v_b
        optimizer.step()
    assert torch.allclose(weight, w, atol=1e-6)
    assert torch.allclose(bias, b, atol=1e-6)


def test_the_probe_standardises_by_batch_without_parameters_of_its_own():
    probe = build_probe(8, 3)
    assert [name for name, _ in probe.named_parameters()] == ["1.weight", "1.bias"]
    features = 5 + 3 * torch.randn(64, 8)
    standard = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-6).sqrt()
    assert torch.allclose(probe(features), standard @ probe[1].weight.T + probe[1].bias, atol=1e-5)


def test_kept_features_come_a_batch_at_a_time():
    kept = FeatureBatches(torch.arange(12.0).view(6, 2), torch.arange(6))
    features, labels = kept.__getitems__([(0, 3), (7, 1)])
    assert features.tolist() == [[6.0, 7.0], [2.0, 3.0]]
    assert labels.tolist() == [3, 1]


@pytest.mark.parametrize(
    "how", [[], ["--solver", "logistic"], ["--augment", "crop", "--batch-size", "8", "--epochs", "3"]]
)
def test_the_command_reads_a_teachers_features(how, photos, vit_weights, capsys):
    name = ["timm/vit_tiny_patch16_224", "--weights", str(vit_weights), "--image-size", "32"]
    epochs = [] if "--epochs" in how else ["--epochs", "20", "--eval-every", "20"]
    code = run(
        ["linear", name[0], str(photos), *name[1:], *how, *epochs, "--workers", "0", "--device", "cpu", "--json"]
    )
    captured = capsys.readouterr()
    assert code == 0, captured.err
    result = json.loads(captured.out.splitlines()[-1])
    assert result["top1"] >= 60
    assert (result["top5"], result["classes"], result["dim"], result["train"], result["val"]) == (100.0, 2, 192, 30, 10)


def test_a_probe_with_a_folder_is_kept_and_resumed_and_is_no_encoder(tiny_run, photos, tmp_path, capsys):
    args = [
        "linear",
        str(tiny_run),
        str(photos),
        "--out",
        str(tmp_path / "probe"),
        "--epochs",
        "10",
        "--eval-every",
        "10",
    ]
    args += ["--workers", "0", "--json"]
    assert run(args) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (tmp_path / "probe" / "confusion.png").exists()
    assert run(args) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] == first["top1"]
    assert run(["knn", str(tmp_path / "probe"), str(photos)]) == 2
    assert "give the run that it was made from" in capsys.readouterr().err


def test_options_that_do_not_go_together_are_one_line(tiny_run, photos, capsys):
    for options, says in (
        (["--augment", "crop", "--solver", "logistic"], "give --augment none"),
        (["--devices", "2"], "give --devices 1"),
        (["--block", "9"], "blocks 0 to 1"),
    ):
        assert run(["linear", str(tiny_run), str(photos), *options, "--workers", "0"]) == 2
        assert says in capsys.readouterr().err.splitlines()[-1]

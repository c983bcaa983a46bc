"""The linear probe: LARS against its formula, and the command with features computed once or augmented."""

import pytest
import torch

from fastmae.cli import run
from fastmae.evaluate.linear import FeatureRows, build_probe, cached_step, lars

CPU = ["--workers", "0", "--device", "cpu"]


def test_lars_scales_weights_by_the_trust_ratio_and_leaves_biases_alone():
    """MAE's LARS: for weights v <- m v + 0.001 |w| / |g| g, for biases v <- m v + g; then w <- w - lr v."""
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


def test_the_probe_standardises_over_the_batch_without_parameters():
    probe = build_probe(8, 3)
    assert [name for name, _ in probe.named_parameters()] == ["1.weight", "1.bias"]
    features = 5 + 3 * torch.randn(64, 8)
    standard = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-6).sqrt()
    assert torch.allclose(probe(features), standard @ probe[1].weight.T + probe[1].bias, atol=1e-5)


def test_features_in_memory_are_read_a_batch_at_a_time_where_they_are():
    rows = FeatureRows(6).__getitems__([(0, 3), (7, 1)])
    assert rows.tolist() == [3, 1]
    features, labels, scores = torch.arange(12.0).view(6, 2), torch.tensor([0, 2, 0, 1, 0, 0]), []

    def model(inputs):
        assert inputs.tolist() == [[6.0, 7.0], [2.0, 3.0]]
        scores.append(torch.stack([inputs[:, 0], inputs[:, 1], -inputs[:, 0]], dim=1))
        return scores[0]

    loss = cached_step(features, labels)(model, rows)["loss"]
    log_shares = scores[0] - scores[0].exp().sum(1, keepdim=True).log()
    assert loss.item() == pytest.approx(-(log_shares[0, 1] + log_shares[1, 2]).item() / 2)


@pytest.mark.parametrize(
    "options",
    ["--epochs 20 --eval-every 20", "--solver logistic", "--augment crop --batch-size 8 --epochs 3"],
    ids=["LARS", "logistic", "augmented"],
)
def test_each_kind_of_probe_separates_a_temple_from_a_flower(options, photos, vit_weights, printed_json):
    args = ["linear", "timm/vit_tiny_patch16_224", str(photos), "--weights", str(vit_weights), "--image-size", "32"]
    assert run([*args, *options.split(), *CPU, "--json"]) == 0
    result = printed_json()
    assert result["top1"] >= 60
    assert (result["top5"], result["classes"], result["dim"], result["train"], result["val"]) == (100.0, 2, 192, 30, 10)


def test_a_probe_with_a_folder_is_a_run_that_can_be_continued_but_holds_no_encoder(
    tiny_run, photos, tmp_path, printed_json, error_line
):
    args = ["linear", str(tiny_run), str(photos), "--out", str(tmp_path / "probe"), "--epochs", "10", *CPU, "--json"]
    assert run(args) == 0
    result = printed_json()
    assert (tmp_path / "probe" / "confusion.png").exists()
    assert run(args) == 0
    assert printed_json() == result
    assert "fastmae linear" in error_line(["knn", str(tmp_path / "probe"), str(photos)])


@pytest.mark.parametrize(
    ("options", "named"),
    [("--augment crop --solver logistic", "--augment"), ("--devices 2", "--devices"), ("--block 9", "--block 9")],
)
def test_options_that_do_not_fit_are_named(options, named, tiny_run, photos, error_line):
    assert named in error_line(["linear", str(tiny_run), str(photos), *options.split(), *CPU])

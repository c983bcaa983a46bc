"""Parameter groups and learning rate schedules, against their formulas."""

import math
from functools import partial

import pytest
import timm
import torch
from timm.optim import Muon, param_groups_layer_decay
from torch import nn

from fastmae.errors import InputError
from fastmae.training.optimiser import cosine_schedule, layer_decayed_groups, linear_schedule, muon, muon_groups


def test_the_learning_rate_rises_linearly_and_falls_by_half_a_cosine():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = cosine_schedule(optimizer, steps=100, warmup_steps=20, min_lr=0.5)
    for step in range(100):
        schedule.step_update(step)
        expected = 2.0 * step / 20 if step < 20 else 0.5 + 1.5 * (1 + math.cos(math.pi * (step - 20) / 80)) / 2
        assert math.isclose(optimizer.param_groups[0]["lr"], expected, abs_tol=1e-9), step


def test_without_warm_up_the_first_step_has_the_full_learning_rate():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=2.0)
    cosine_schedule(optimizer, steps=10, warmup_steps=0, min_lr=0.0).step_update(0)
    assert optimizer.param_groups[0]["lr"] == 2.0


def test_layers_nearer_to_the_input_learn_more_slowly():
    """MAE's rule: decay^(L + 1 - id), with id 0 for the embeddings, i + 1 for block i, L + 1 for the rest."""
    encoder = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=5)
    model = nn.Sequential(encoder, nn.Linear(5, 2))
    groups = layer_decayed_groups(model, encoder, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group.get("lr_scale", 1.0) for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    names = dict(encoder.named_parameters()) | {f"top.{name}": p for name, p in model[1].named_parameters()}
    assert len(scale) == len(names) == sum(len(group["params"]) for group in groups)
    for name, parameter in names.items():
        layer = 0 if name.startswith(("patch_embed", "pos_embed", "cls_token")) else 4
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else layer
        assert scale[id(parameter)] == 0.5 ** (4 - layer), name
        exempt = parameter.ndim <= 1 or name in ("pos_embed", "cls_token")
        assert decay[id(parameter)] == (0 if exempt else 0.05), name


def test_the_linear_schedule_scales_each_layers_learning_rate():
    parameter = [nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.AdamW([{"params": parameter, "lr_scale": 0.25}], lr=2.0)
    schedule = linear_schedule(optimizer, steps=110, warmup_steps=10, min_lr=0.0)
    for step in range(110):
        schedule.step_update(step)
        expected = 2.0 * step / 10 if step < 10 else 2.0 * (1 - (step - 10) / 100)
        assert math.isclose(optimizer.param_groups[0]["lr"], 0.25 * expected, abs_tol=1e-9), step


def test_the_layers_of_a_network_that_is_no_vit_are_timms_groups():
    network = timm.create_model("resnet10t", num_classes=5)
    groups = layer_decayed_groups(network, network, weight_decay=0.05, layer_decay=0.5)
    expected = param_groups_layer_decay(network, weight_decay=0.05, layer_decay=0.5)

    def of_parameters(groups):
        return {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}

    assert of_parameters(groups) == of_parameters(expected)
    assert min(group["lr_scale"] for group in groups) < 0.1


def test_layer_decay_needs_timms_groups_and_1_needs_none():
    network = timm.create_model("poolformerv2_s12", num_classes=5)
    groups = layer_decayed_groups(network, network, weight_decay=0.05, layer_decay=1)
    assert {group["lr_scale"] for group in groups} == {1}
    with pytest.raises(InputError, match=r"--layer-decay 0\.5"):
        layer_decayed_groups(network, network, weight_decay=0.05, layer_decay=0.5)


def test_muon_gets_the_weight_matrices_of_blocks_and_adamw_everything_else():
    encoder = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    groups = muon_groups(encoder, weight_decay=0.05)
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    by_group = [{names[id(parameter)] for parameter in group["params"]} for group in groups]
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert by_group[0] == {f"blocks.{block}.{layer}.weight" for block in range(2) for layer in layers}
    assert by_group[1] == {"cls_token", "pos_embed", "patch_embed.proj.weight", "head.weight"}
    assert set.union(*by_group) == set(names.values())
    assert [(group.get("use_fallback", False), group["weight_decay"]) for group in groups] == [
        (False, 0.05),
        (True, 0.05),
        (True, 0.0),
    ]


def test_muon_does_not_get_a_table_of_relative_positions():
    network = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)
    matrices = {id(parameter) for parameter in muon_groups(network, weight_decay=0.05)[0]["params"]}
    of_muon = [name for name, parameter in network.named_parameters() if id(parameter) in matrices]
    assert len(of_muon) == 4 * 12
    assert all(name.endswith(".weight") for name in of_muon)


def test_muons_first_step_is_the_orthogonalised_gradient_at_adamws_rms():
    """Orthogonal to the accuracy of five Newton-Schulz steps: singular values of 0.7 to 1.2, times 0.2 sqrt(rows)."""
    weight = nn.Parameter(torch.zeros(64, 16))
    optimizer = muon([{"params": [weight], "weight_decay": 0.0}], lr=0.1, betas=(0.9, 0.95))
    weight.grad = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    update = -weight.detach() / (0.1 * 0.2 * math.sqrt(64))
    singular_values = torch.linalg.svdvals(update)
    assert singular_values.min() > 0.6 and singular_values.max() < 1.3
    left, _, right = torch.linalg.svd(weight.grad, full_matrices=False)
    torch.testing.assert_close(update / singular_values.mean(), left @ right, atol=0.12, rtol=0.0)


def test_muon_computes_in_float32_on_a_cpu_and_leaves_timms_own_in_bf16():
    gradient = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    updates = []
    for make in (muon, partial(Muon, momentum=0.95, nesterov=True)):
        weight = nn.Parameter(torch.zeros(64, 16))
        optimizer = make([{"params": [weight], "weight_decay": 0.0}], lr=0.1, betas=(0.9, 0.95))
        weight.grad = gradient.clone()
        optimizer.step()
        updates.append(weight.detach())
    in_float32, in_bf16 = updates
    assert not torch.equal(in_float32, in_float32.bfloat16().float())
    difference = (in_float32 - in_bf16).norm() / in_bf16.norm()
    assert 1e-5 < difference < 2e-2

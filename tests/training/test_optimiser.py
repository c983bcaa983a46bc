import math

import torch
from torch import nn

from fastmae.model import Student, build_encoder
from fastmae.training.optimiser import adamw, cosine_schedule


def test_weight_decay_spares_what_has_fewer_than_two_dimensions():
    model = Student(build_encoder("vit_tiny_patch16_224", 64, 16, 48, 2, 3), 10, decoder_width=32, decoder_heads=4)
    optimizer = adamw(model, 1e-3, 0.05, (0.9, 0.95))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.05 for p in group["params"]}
    spared = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert decayed | spared == {id(p) for p in trainable.values()}
    for name, parameter in trainable.items():
        assert (id(parameter) in spared) == (parameter.ndim <= 1), name
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_the_learning_rate_is_linear_then_half_a_cosine():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = cosine_schedule(optimizer, steps=100, warmup_steps=20, min_lr=0.5)
    for step in range(100):
        schedule.step_update(step)
        expected = 2.0 * step / 20 if step < 20 else 0.5 + 1.5 * (1 + math.cos(math.pi * (step - 20) / 80)) / 2
        assert math.isclose(optimizer.param_groups[0]["lr"], expected, abs_tol=1e-9), step


def test_no_warm_up_starts_at_the_full_rate():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=2.0)
    cosine_schedule(optimizer, steps=10, warmup_steps=0, min_lr=0.0).step_update(0)
    assert optimizer.param_groups[0]["lr"] == 2.0

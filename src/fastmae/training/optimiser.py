"""AdamW with MAE's parameter groups, and the learning rate of each step."""

from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from torch import nn


def adamw(
    model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float], fused: bool = True
) -> torch.optim.AdamW:
    """AdamW; biases, norms and other parameters of fewer than two dimensions are not decayed (as in MAE)."""
    groups = param_groups_weight_decay(model, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)


def layer_decayed_groups(
    model: nn.Module, encoder: Any, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups of an encoder with something on top: what is trained of them, with `lr_scale` for timm's schedules.

    Block i of L learns at decay^(L - i) of the full rate, the embeddings at decay^(L + 1), the norm after the blocks and all that is not
    the encoder's at the full rate (BEiT's and MAE's rule; timm's own counts the norm to the last block). Biases, norms and, as MAE has it,
    positions and the class token are not decayed.

    Args:
        model: all of it.
        encoder: the part of it that is a timm ViT.
        weight_decay: AdamW's.
        layer_decay: 1 for none.
    """
    top = len(encoder.blocks) + 1
    layers = group_parameters(encoder, encoder.group_matcher(coarse=False), reverse=True)
    below = {name: layer for name, layer in layers.items() if layer == 0 or name.startswith("blocks.")}
    of = {
        parameter: (below.get(name, top), name in encoder.no_weight_decay())
        for name, parameter in encoder.named_parameters()
    }
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        layer, spared = of.get(parameter, (top, False))
        spared = spared or parameter.ndim <= 1
        made = {"params": [], "lr_scale": layer_decay ** (top - layer), "weight_decay": 0.0 if spared else weight_decay}
        groups.setdefault((layer, spared), made)["params"].append(parameter)
    return list(groups.values())


def linear_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int, min_lr: float) -> PolyLRScheduler:
    """Linear from 0 over the warm-up, then linear down to `min_lr` (the poly schedule of power 1)."""
    return PolyLRScheduler(
        optimizer, t_initial=max(1, steps - warmup_steps), power=1.0, lr_min=min_lr,
        warmup_t=warmup_steps, warmup_lr_init=0.0, warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip


def cosine_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int, min_lr: float
) -> CosineLRScheduler:
    """Linear from 0 over the warm-up, then half a cosine down to `min_lr`; call `step_update(step)` before each step."""
    return CosineLRScheduler(
        optimizer, t_initial=max(1, steps - warmup_steps), lr_min=min_lr,
        warmup_t=warmup_steps, warmup_lr_init=0.0, warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip

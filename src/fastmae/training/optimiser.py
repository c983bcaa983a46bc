"""AdamW with MAE's parameter groups, and the learning rate of each step."""

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn


def adamw(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float], fused: bool = True) -> torch.optim.AdamW:
    """AdamW; biases, norms and other parameters of fewer than two dimensions are not decayed (as in MAE)."""
    groups = param_groups_weight_decay(model, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int, min_lr: float) -> CosineLRScheduler:
    """Linear from 0 over the warm-up, then half a cosine down to `min_lr`; call `step_update(step)` before each step."""
    return CosineLRScheduler(
        optimizer, t_initial=max(1, steps - warmup_steps), lr_min=min_lr,
        warmup_t=warmup_steps, warmup_lr_init=0.0, warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip

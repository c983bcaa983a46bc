"""Floating-point operations of a training step, counted while one runs."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmae.config import PretrainConfig
from fastmae.pretraining.plan import make_plan
from fastmae.pretraining.pretrain import pretraining_task

IMAGES = 2
"""Images of the step that is counted. So few also keep `runtime.fast_linear` to plain matrix products."""


def training_flops(config: PretrainConfig) -> float:
    """FLOPs per image of a step with these options: forward and backward, and an online teacher's forward.

    Matrix products and convolutions are counted, a multiplication with its addition as two; norms, activations, the
    loss and the optimizer are not. Attention is computed as plain products, since torch's counter does not know its
    fused operator on CPUs.
    """
    plan = make_plan(config)
    task = pretraining_task(config, plan)
    batch = task.dataset.__getitems__([(0, index) for index in range(IMAGES)])  # type: ignore[attr-defined]
    network = task.network.train()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        task.step(network, batch)["loss"].backward()
    return counter.get_total_flops() / IMAGES

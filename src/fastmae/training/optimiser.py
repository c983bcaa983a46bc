"""AdamW with MAE's parameter groups, Muon, and the schedules of the learning rate."""

from functools import partial
from typing import Any

import timm.optim.muon as timm_muon
import torch
from timm.models import group_parameters
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.optim import Muon
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from torch import nn

from fastmae.errors import InputError
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import scales_gradients


def adamw(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], fabric: Fabric) -> torch.optim.AdamW:
    """AdamW; fused, unless the gradients are scaled: a fused step would unscale them too late for clipping."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=not scales_gradients(fabric))


class MuonForAllDevices(Muon):
    """timm's Muon. On a CPU, its Newton-Schulz steps are in float32.

    timm's are in bf16, in which a CPU without instructions for it takes 15 times as long for a matrix of 384 x 128, and
    47 times for one of 768 x 3072.
    """

    def step(self, closure: Any = None) -> Any:
        """As timm's."""
        in_bf16 = timm_muon.zeropower_via_newtonschulz
        if self.param_groups[0]["params"][0].device.type == "cpu":
            timm_muon.zeropower_via_newtonschulz = partial(in_bf16, dtype=torch.float32)
        try:
            return super().step(closure)
        finally:
            timm_muon.zeropower_via_newtonschulz = in_bf16


def muon(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> Muon:
    """timm's Muon (Jordan et al. 2024): momentum with Nesterov's look-ahead, orthogonalised by Newton-Schulz steps.

    Updates are scaled to AdamW's RMS (Liu et al. 2025), so learning rate and weight decay keep their meaning.

    Args:
        groups: from `muon_groups`.
        lr: peak learning rate.
        betas: of AdamW, for the parameters that Muon leaves to it.
    """
    return MuonForAllDevices(groups, lr=lr, momentum=0.95, nesterov=True, betas=betas)


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: the weight matrices of transformer blocks for Muon, the others for AdamW.

    Biases and norms get no weight decay, as under AdamW.

    Args:
        model: only its parameters that require gradients are taken.
        weight_decay: of both.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            *modules, kind = name.split(".")
            is_matrix = kind == "weight" and parameter.ndim == 2  # a table of relative positions is none
            in_block = any(module.endswith("blocks") for module in modules)
            group = plain if parameter.ndim <= 1 else matrices if in_block and is_matrix else others
            group.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": weight_decay, "use_fallback": True},
        {"params": plain, "weight_decay": 0.0, "use_fallback": True},
    ]
    return [group for group in groups if group["params"]]


def layer_decayed_groups(
    model: nn.Module, encoder: Any, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups of an encoder and the layers on top of it, with `lr_scale` for timm's schedules.

    Block i of L learns at decay^(L - i) of the full rate, the embeddings at decay^(L + 1), the final norm and
    everything that is not the encoder's at the full rate (the rule of BEiT and MAE; timm's own counts the norm to the
    last block). Biases, norms and, as in MAE, position embeddings and the class token get no weight decay.
    In a network that is no ViT, the layers are timm's groups: a ResNet's blocks, for example.

    Args:
        model: the whole network; only parameters that require gradients are taken.
        encoder: the part of it that is a network of timm.
        weight_decay: of AdamW.
        layer_decay: 1 for none.

    Raises:
        InputError: timm does not group the network's layers.
    """
    is_vit = type(encoder) in (VisionTransformer, Eva)
    top, below_top = _vit_layers(encoder) if is_vit else _network_layers(encoder, layer_decay)
    no_decay = encoder.no_weight_decay() if hasattr(encoder, "no_weight_decay") else set()
    of_encoder = {p: (below_top.get(name, top), name in no_decay) for name, p in encoder.named_parameters()}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        layer, exempt = of_encoder.get(parameter, (top, False))
        exempt = exempt or parameter.ndim <= 1
        group = {
            "params": [],
            "lr_scale": layer_decay ** (top - layer),
            "weight_decay": 0.0 if exempt else weight_decay,
        }
        groups.setdefault((layer, exempt), group)["params"].append(parameter)
    return list(groups.values())


def _vit_layers(encoder: Any) -> tuple[int, dict[str, int]]:
    """Number of the layer above a ViT's last block, and the layer of each parameter below it, by name."""
    layer_of_name = group_parameters(encoder, encoder.group_matcher(coarse=False), reverse=True)
    below_top = {name: i for name, i in layer_of_name.items() if i == 0 or name.startswith("blocks.")}
    return len(encoder.blocks) + 1, below_top


def _network_layers(encoder: Any, layer_decay: float) -> tuple[int, dict[str, int]]:
    """As `_vit_layers`, for any other network, by timm's groups."""
    if layer_decay == 1:
        return 0, {}
    if not hasattr(encoder, "group_matcher"):
        raise InputError(
            f"--layer-decay {layer_decay}: timm does not say which layers a {type(encoder).__name__} has; "
            "give --layer-decay 1"
        )
    layer_of_name = group_parameters(encoder, encoder.group_matcher(coarse=False), reverse=True)
    return max(layer_of_name.values()), layer_of_name


def linear_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int, min_lr: float) -> PolyLRScheduler:
    """Linear from 0 over the warm-up, then linear down to `min_lr` (a poly schedule of power 1)."""
    return PolyLRScheduler(
        optimizer,
        t_initial=max(1, steps - warmup_steps),
        power=1.0,
        lr_min=min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def cosine_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int, min_lr: float
) -> CosineLRScheduler:
    """Linear from 0 over the warm-up, then half a cosine down to `min_lr`. Call `step_update(step)` before each
    step."""
    return CosineLRScheduler(
        optimizer,
        t_initial=max(2, steps - warmup_steps),  # timm warns about 1; for a single step, 2 gives the same rate
        lr_min=min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )

"""What the layouts for ViTs share: another library's names for timm's weights, and what such a library can't hold."""

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import Mlp, QuickGELU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from fastmae.errors import InputError
from fastmae.exporting.exported_model import ExportedModel

Names = Mapping[str, str]
"""Pattern of timm's name -> the other library's. A weight that no pattern matches has no place there."""
ACTIVATIONS: dict[type[nn.Module], str] = {nn.GELU: "gelu", QuickGELU: "quick_gelu"}
UNSUPPORTED_WEIGHTS = {
    "reg_token": "register tokens",
    ".ls1.": "layer scale",
    ".q_norm.": "normalised queries and keys",
    "norm_pre.": "a norm before the blocks",
    "fc_norm.": "a norm after pooling",
}
"""Part of timm's name -> in words, for weights that a library may have no place for."""


def check_layout(
    model: ExportedModel,
    format_name: str,
    library: str,
    names: Names,
    misfits: Callable[[Any], Mapping[str, bool]],
    others: str = "timm or onnx",
) -> None:
    """Check that another library's ViT can hold a model.

    Args:
        model: the model.
        format_name: value of `--format`.
        library: its name, for messages.
        names: its names.
        misfits: what it can't hold besides weights without a name, in words that follow "it has" -> whether a network
            has it.
        others: the formats that the message offers instead.

    Raises:
        InputError: it can't.
    """
    if not model.is_vit:
        raise InputError(
            f"--format {format_name}: {model.source} ({model.architecture}) is no plain ViT; use --format timm or onnx"
        )
    misfit = _misfit(model.network, names) or next(
        (words for words, applies in misfits(model.network).items() if applies), ""
    )
    if misfit:
        raise InputError(
            f"--format {format_name}: {model.source} ({model.architecture}) does not fit {library}'s ViT, "
            f"since it has {misfit}; use --format {others}"
        )


def _misfit(network: Any, names: Names) -> str:
    if type(network) is not VisionTransformer:
        return "rotary positions"
    for name in network.state_dict():
        if not any(re.fullmatch(pattern, name) for pattern in names):
            return next((words for part, words in UNSUPPORTED_WEIGHTS.items() if part in name), f"weights {name}")
    if network.pos_embed is None:
        return "no position embeddings"
    if not all(isinstance(norm, nn.LayerNorm) for block in network.blocks for norm in (block.norm1, block.norm2)):
        return "norms of another kind"
    plain = all(
        type(block) is Block and type(block.mlp) is Mlp and type(block.mlp.act) in ACTIVATIONS
        for block in network.blocks
    )
    return "" if plain else "blocks of another kind"


def renamed(name: str, names: Names) -> str:
    """Another library's name for a weight of timm's."""
    pattern = next(pattern for pattern in names if re.fullmatch(pattern, name))
    return re.sub(pattern, names[pattern], name)


def with_weights_of(network: Any, tensors: Mapping[str, torch.Tensor], names: Names) -> Any:
    """A copy of a network with the weights that are stored under another library's names.

    Args:
        network: timm's. Its weights that `tensors` lacks are kept.
        tensors: name in the other library -> weight.
        names: the other library's names.
    """
    timm_names = {renamed(name, names): name for name in network.state_dict() if _has_place(name, names)}
    copied = copy.deepcopy(network)
    copied.load_state_dict({timm_names[name]: tensor for name, tensor in tensors.items()}, strict=False)
    return copied


def _has_place(name: str, names: Names) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in names)

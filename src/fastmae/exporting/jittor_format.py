"""A folder for Jittor: weights, config, and the network's own file, model.py, which needs Jittor and numpy alone."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmae import __version__
from fastmae.config import ExportConfig
from fastmae.exporting.export_format import ExportFormat
from fastmae.exporting.exported_model import ExportedModel, model_outputs
from fastmae.exporting.output_folder import write_weights
from fastmae.exporting.vit_layout import check_layout, with_weights_of
from fastmae.outside.tensors import read_tensors
from fastmae.runs.timm_config import EXPORT_CONFIG, EXPORT_WEIGHTS
from fastmae.runtime.durable import write_json

MODEL_FILE = "model.py"
NAMES = {
    r"(cls_token|reg_token|pos_embed)": r"\1",
    r"(patch_embed\.proj|norm_pre|norm|fc_norm|head)\.(weight|bias)": r"\1.\2",
    r"(blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2))\.(weight|bias)": r"\1.\3",
    r"(blocks\.\d+\.ls[12])\.gamma": r"\1.gamma",
}
"""The weights that model.py has a place for. Their names are timm's."""


def check(model: ExportedModel) -> None:
    """Check that model.py can hold the model.

    Raises:
        InputError: it can't.
    """
    check_layout(model, "jittor", "model.py", NAMES, _misfits)


def _misfits(network: Any) -> dict[str, bool]:
    positions = network.pos_embed.shape[1] - network.patch_embed.num_patches
    return {
        f"pooling of the kind '{network.global_pool}'": network.global_pool not in ("avg", "token"),
        "prefix tokens among those that are averaged": network.pool_include_prefix and network.num_prefix_tokens > 0,
        "position embeddings for some prefix tokens only": positions not in (0, network.num_prefix_tokens),
    }


def write(model: ExportedModel, folder: Path, _: ExportConfig) -> None:
    """Write model.py, config.json and model.safetensors."""
    shutil.copyfile(Path(__file__).parent / "jittor" / MODEL_FILE, folder / MODEL_FILE)
    write_weights(folder / EXPORT_WEIGHTS, {name: value.contiguous() for name, value in _float32(model).items()})
    write_json(
        folder / EXPORT_CONFIG,
        {
            "fastmae": __version__,
            "network": arguments(model),
            "mean": list(model.mean),
            "std": list(model.std),
            "classes": list(model.classes),
        },
    )


def _float32(model: ExportedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().float() for name, tensor in model.network.state_dict().items()}


def arguments(model: ExportedModel) -> dict[str, Any]:
    """The arguments of model.py's VisionTransformer."""
    network = model.network
    block, prefix = network.blocks[0], network.num_prefix_tokens
    return {
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "channels": model.channels,
        "width": network.embed_dim,
        "depth": len(network.blocks),
        "heads": block.attn.num_heads,
        "hidden": block.mlp.fc1.out_features,
        "eps": block.norm1.eps,
        "class_token": network.cls_token is not None,
        "registers": prefix - (network.cls_token is not None),
        "prefix_positions": network.pos_embed.shape[1] > network.patch_embed.num_patches,
        "qkv_bias": block.attn.qkv.bias is not None,
        "patch_bias": network.patch_embed.proj.bias is not None,
        "layer_scale": not isinstance(block.ls1, nn.Identity),
        "quick_gelu": type(block.mlp.act) is not nn.GELU,
        "pre_norm": not isinstance(network.norm_pre, nn.Identity),
        "final_norm": not isinstance(network.norm, nn.Identity),
        "pool_norm": not isinstance(network.fc_norm, nn.Identity),
        "pool": network.global_pool,
        "classes": len(model.classes),
    }


@torch.inference_mode()
def read(model: ExportedModel, folder: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """All outputs, from timm's network with the file's weights."""
    return model_outputs(with_weights_of(model.network, read_tensors(folder / EXPORT_WEIGHTS), NAMES), images)


def usage(model: ExportedModel, folder: str) -> str:
    """Python code that loads the folder with Jittor."""
    classes, network = len(model.classes), model.network
    pooled = (
        f"logits = encoder(images)  # [B, {classes}]" if classes else f"features = encoder(images)  # [B, {model.dim}]"
    )
    return f"""\
import sys

import jittor

sys.path.insert(0, "{folder}")
import model

encoder = model.load("{folder}")
# images: jittor.Var [B, {model.image_shape}], normalised
{pooled}
tokens = encoder.tokens(images)  # [B, {network.num_prefix_tokens} + {network.patch_embed.num_patches}, {model.dim}]: \
prefix tokens, patch tokens
"""


JITTOR = ExportFormat("jittor", check, write, read, usage, read_by="timm")

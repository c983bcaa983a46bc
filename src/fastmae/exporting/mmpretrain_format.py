"""The weights of mmpretrain's VisionTransformer, a backbone of mmpretrain, mmdetection and mmsegmentation."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmae.config import ExportConfig
from fastmae.errors import InputError
from fastmae.exporting.export_format import ExportFormat
from fastmae.exporting.exported_model import CLASS, PATCHES, ExportedModel, model_outputs
from fastmae.exporting.output_folder import write_pth
from fastmae.exporting.vit_layout import check_layout, renamed, with_weights_of
from fastmae.outside.tensors import read_tensors

PTH_FILE = "backbone.pth"
"""OpenMMLab's loader reads what torch.save has written, and no safetensors."""
NAMES = {
    r"cls_token|pos_embed": r"\g<0>",
    r"patch_embed\.proj\.(weight|bias)": r"patch_embed.projection.\1",
    r"norm_pre\.(weight|bias)": r"pre_norm.\1",
    r"blocks\.(\d+)\.norm([12])\.(weight|bias)": r"layers.\1.ln\2.\3",
    r"blocks\.(\d+)\.attn\.(qkv|proj)\.(weight|bias)": r"layers.\1.attn.\2.\3",
    r"blocks\.(\d+)\.ls1\.gamma": r"layers.\1.attn.gamma1.weight",
    r"blocks\.(\d+)\.mlp\.fc1\.(weight|bias)": r"layers.\1.ffn.layers.0.0.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(weight|bias)": r"layers.\1.ffn.layers.1.\2",
    r"blocks\.(\d+)\.ls2\.gamma": r"layers.\1.ffn.gamma2.weight",
    r"norm\.(weight|bias)": r"ln1.\1",
}
"""Pattern of timm's name -> mmpretrain's."""


def check(model: ExportedModel) -> None:
    """Check that mmpretrain's ViT can hold the encoder.

    Raises:
        InputError: it can't.
    """
    if model.classes:
        raise InputError(
            "--classifier: mmpretrain's ViT heads read the class token; leave it out, or use --format timm or onnx"
        )
    check_layout(model, "mmpretrain", "mmpretrain", NAMES, _misfits)


def _misfits(network: Any) -> dict[str, bool]:
    prefix = int(network.cls_token is not None)
    return {
        "no position embedding for the class token": network.pos_embed.shape[1] - network.patch_embed.num_patches
        != prefix,
        "CLIP's approximate GELU": type(network.blocks[0].mlp.act) is not nn.GELU,
    }


def write(model: ExportedModel, folder: Path, _: ExportConfig) -> None:
    """Write the weights, under the names that the backbone itself has for them."""
    write_pth(folder / PTH_FILE, {renamed(name, NAMES): value for name, value in model.network.state_dict().items()})


@torch.inference_mode()
def read(model: ExportedModel, folder: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Class token and patch tokens, from timm's network with the file's weights."""
    network = with_weights_of(model.network, read_tensors(folder / PTH_FILE), NAMES)
    return {name: output for name, output in model_outputs(network, images).items() if name in (CLASS, PATCHES)}


def usage(model: ExportedModel, folder: str) -> str:
    """Lines for a config file, and Python code that builds the backbone from them."""
    network = model.network
    block, has_bias = network.blocks[0], network.patch_embed.proj.bias is not None
    has_norm = not isinstance(network.norm_pre, nn.Identity)
    switches = {
        "with_cls_token=False, ": network.cls_token is None,
        "qkv_bias=False, ": block.attn.qkv.bias is None,
        "pre_norm=True, ": has_norm,
        "final_norm=False, ": isinstance(network.norm, nn.Identity),
        # Any value but 0 makes mmpretrain build the layer.
        "layer_scale_init_value=1e-5, ": not isinstance(block.ls1, nn.Identity),
        f"patch_cfg=dict(bias={has_bias}), ": has_bias == has_norm,  # mmpretrain leaves it out beside such a norm
    }
    asked = "".join(switch for switch, applies in switches.items() if applies)
    mean, std = ([round(255 * value, 3) for value in values] for values in (model.mean, model.std))
    return f"""\
from mmpretrain.registry import MODELS
import mmpretrain.models

# These two go into a config file. In mmdetection and mmsegmentation, the type is "mmpretrain.VisionTransformer".
backbone = dict(
    type="VisionTransformer", img_size={model.image_size}, patch_size={model.patch_size}, in_channels={model.channels},
    arch=dict(
        embed_dims={model.dim}, num_layers={len(network.blocks)}, num_heads={block.attn.num_heads}, \
feedforward_channels={block.mlp.fc1.out_features}
    ),
    norm_cfg=dict(type="LN", eps={block.norm1.eps}), {asked}out_type="featmap",
    init_cfg=dict(type="Pretrained", checkpoint="{folder}/{PTH_FILE}"),
)
data_preprocessor = dict(mean={mean}, std={std}, to_rgb=True)  # of pixels from 0 to 255

model = MODELS.build(backbone)
model.init_weights()  # loads the checkpoint
model.eval()
features = model(images)[0].mean((2, 3))  # images [B, {model.image_shape}] -> [B, {model.dim}]
"""


MMPRETRAIN = ExportFormat("mmpretrain", check, write, read, usage, read_by="timm")

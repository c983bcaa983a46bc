"""The weights of detectron2's ViT, the backbone of ViTDet.

This ViT has neither a class token nor a final norm: its features are those of the last block, of the patches alone.
Weights of MAE are used in the same way there.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmae.config import ExportConfig
from fastmae.errors import InputError
from fastmae.exporting.export_format import ExportFormat
from fastmae.exporting.exported_model import MAP, ExportedModel
from fastmae.exporting.output_folder import write_pth
from fastmae.exporting.vit_layout import check_layout, renamed, with_weights_of
from fastmae.outside.tensors import read_tensors

PTH_FILE = "backbone.pth"
"""detectron2's checkpointer reads what torch.save has written, and no safetensors."""
KEPT = {
    r"pos_embed": r"\g<0>",
    r"patch_embed\.proj\.(weight|bias)": r"\g<0>",
    r"blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)": r"\g<0>",
}
"""Pattern of the weights that this ViT has. Their names are timm's."""
LEFT_OUT = {r"cls_token|norm\.(weight|bias)": ""}
"""Pattern of the weights that it has no use for."""


def check(model: ExportedModel) -> None:
    """Check that detectron2's ViT can hold the encoder.

    Raises:
        InputError: it can't.
    """
    if model.classes:
        raise InputError("--classifier: detectron2's ViT has no classifier; leave it out, or use --format timm or onnx")
    check_layout(model, "detectron2", "detectron2", {**KEPT, **LEFT_OUT}, _misfits, "timm, mmpretrain or onnx")


def _misfits(network: Any) -> dict[str, bool]:
    mlp = network.blocks[0].mlp
    prefix, width = int(network.cls_token is not None), network.embed_dim
    return {
        "no position embedding for the class token": network.pos_embed.shape[1] - network.patch_embed.num_patches
        != prefix,
        "a patch projection without bias": network.patch_embed.proj.bias is None,
        "CLIP's approximate GELU": type(mlp.act) is not nn.GELU,
        f"an MLP of width {mlp.fc1.out_features}": int(width * _mlp_ratio(network)) != mlp.fc1.out_features,
    }


def _mlp_ratio(network: Any) -> float:
    ratio: float = network.blocks[0].mlp.fc1.out_features / network.embed_dim
    return ratio


def write(model: ExportedModel, folder: Path, _: ExportConfig) -> None:
    """Write the weights. The class token's position stays: the ViT skips it, and its configs count on it."""
    weights = model.network.state_dict()
    kept = {name for name in weights if name != "cls_token" and not name.startswith("norm.")}
    write_pth(folder / PTH_FILE, {renamed(name, KEPT): weights[name] for name in weights if name in kept})


def last_feature(network: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the ViT calls last_feat, computed by timm's network: `MAP` [B, D, g, g].

    Args:
        network: a plain ViT in evaluation mode.
        images: float32 [B, K, S, S], normalised.
    """
    patches = network.patch_embed.num_patches
    embedded = network.patch_embed(images).flatten(1, -2)  # with dynamic_img_size, timm gives a map
    tokens = network.blocks(embedded + network.pos_embed[:, -patches:])
    return {MAP: tokens.transpose(1, 2).unflatten(2, network.patch_embed.grid_size)}


@torch.inference_mode()
def read(model: ExportedModel, folder: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The last feature, from timm's network with the file's weights."""
    return last_feature(with_weights_of(model.network, read_tensors(folder / PTH_FILE), KEPT), images)


def usage(model: ExportedModel, folder: str) -> str:
    """Python code that builds the backbone, and what to set in ViTDet's configs."""
    network = model.network
    block, positions = network.blocks[0], network.cls_token is not None
    mean, std = ([round(255 * value, 3) for value in values] for values in (model.mean, model.std))
    return f"""\
from functools import partial

import torch
from detectron2.modeling import ViT

arguments = dict(
    patch_size={model.patch_size}, in_chans={model.channels}, embed_dim={model.dim}, depth={len(network.blocks)}, \
num_heads={block.attn.num_heads},
    mlp_ratio={_mlp_ratio(network):g}, qkv_bias={block.attn.qkv.bias is not None}, \
norm_layer=partial(torch.nn.LayerNorm, eps={block.norm1.eps}),
    pretrain_img_size={model.image_size}, pretrain_use_cls_token={positions},
)
model = ViT(img_size={model.image_size}, **arguments).eval()
model.load_state_dict(torch.load("{folder}/{PTH_FILE}", weights_only=True))
features = model(images)["last_feat"]  # images [B, {model.image_shape}] -> [B, {model.dim}, \
{model.grid}, {model.grid}]; no class token, no final norm

# In a config of ViTDet:
#     model.backbone.net.update(arguments)
#     model.pixel_mean, model.pixel_std = {mean}, {std}
#     train.init_checkpoint = "{folder}/{PTH_FILE}?matching_heuristics=True"
"""


DETECTRON2 = ExportFormat(
    "detectron2", check, write, read, usage, read_by="timm without class token and final norm", expected=last_feature
)

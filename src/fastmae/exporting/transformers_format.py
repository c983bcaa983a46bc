"""A folder for transformers' ViTModel: the same network under its names, and the preprocessing that goes with it."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.layers import Mlp, QuickGELU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from fastmae.config.exporting import ExportConfig
from fastmae.errors import FailedCheckError, InputError
from fastmae.exporting.format import CLASS, PATCHES, Exported, Format, package
from fastmae.runs.encoder import EXPORT_WEIGHTS

ACTIVATIONS: dict[type[nn.Module], str] = {nn.GELU: "gelu", QuickGELU: "quick_gelu"}
NAMES = {
    r"cls_token": "embeddings.cls_token",
    r"pos_embed": "embeddings.position_embeddings",
    r"patch_embed\.proj\.(weight|bias)": r"embeddings.patch_embeddings.projection.\1",
    r"blocks\.(\d+)\.norm1\.(weight|bias)": r"encoder.layer.\1.layernorm_before.\2",
    r"blocks\.(\d+)\.norm2\.(weight|bias)": r"encoder.layer.\1.layernorm_after.\2",
    r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)": r"encoder.layer.\1.attention.attention.{}.\2",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"encoder.layer.\1.attention.output.dense.\2",
    r"blocks\.(\d+)\.mlp\.fc1\.(weight|bias)": r"encoder.layer.\1.intermediate.dense.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(weight|bias)": r"encoder.layer.\1.output.dense.\2",
    r"norm\.(weight|bias)": r"layernorm.\1",
}
"""timm's names -> those in transformers' files; what matches none of them, its ViT does not have."""
FOREIGN = {
    "reg_token": "register tokens",
    ".ls1.": "layer scale",
    ".q_norm.": "normalised queries and keys",
    "norm_pre.": "a norm before the blocks",
    "fc_norm.": "its norm after pooling",
}
"""Parts that timm's ViTs may have and transformers' ViT has not."""
BICUBIC = 3
"""Pillow's number, by which transformers' processors name it."""


def check(model: Exported) -> None:
    """Whether transformers' ViT can hold this encoder.

    Raises:
        InputError: it can't, or transformers is not installed.
    """
    package("transformers")
    if model.classes:
        raise InputError("--classifier: transformers' classifiers read the class token; take --format timm or onnx")
    lacking = _foreign_part(model.network)
    if lacking:
        raise InputError(
            f"--format transformers: {model.source} ({model.architecture}) has {lacking}, which transformers' ViT has not; "
            "take --format timm or onnx"
        )


def write(model: Exported, folder: Path, _: ExportConfig) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json."""
    transformers, network = package("transformers"), model.network
    block = network.blocks[0]
    config = transformers.ViTConfig(
        hidden_size=network.embed_dim, num_hidden_layers=len(network.blocks), num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features, hidden_act=ACTIVATIONS[type(block.mlp.act)], layer_norm_eps=block.norm1.eps,
        image_size=model.image_size, patch_size=model.patch_size, encoder_stride=model.patch_size, num_channels=model.channels,
        qkv_bias=block.attn.qkv.bias is not None, pooler_act="linear", architectures=["ViTModel"], dtype="float32",
    )  # fmt: skip
    config.save_pretrained(folder)
    safetensors.torch.save_file(renamed(network), folder / EXPORT_WEIGHTS, metadata={"format": "pt"})
    _processor(model, transformers).save_pretrained(folder)


def renamed(network: Any) -> dict[str, torch.Tensor]:
    """The encoder's weights under transformers' names.

    Its ViTModel has a pooler, which no pre-training here makes: the identity stands in for it, so that `pooler_output` is the
    class token and not a product with random numbers.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in network.state_dict().items():
        ours, theirs = next((ours, theirs) for ours, theirs in NAMES.items() if re.fullmatch(ours, name))
        theirs = re.sub(ours, theirs, name)
        parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True) if "{}" in theirs else [("", tensor)]
        weights |= {theirs.format(part): values.detach().contiguous().clone() for part, values in parts}
    width = network.embed_dim
    return {**weights, "pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}


@torch.inference_mode()
def read(folder: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Class token and patch tokens of the ViTModel that transformers makes of a folder.

    Raises:
        FailedCheckError: a weight is missing there, or not used.
    """
    transformers = package("transformers")
    with _quiet(transformers):
        model, loading = transformers.ViTModel.from_pretrained(folder, output_loading_info=True)
        transformers.AutoImageProcessor.from_pretrained(folder)
    astray = [*loading["missing_keys"], *loading["unexpected_keys"], *loading["mismatched_keys"]]
    if astray:
        raise FailedCheckError(
            f"{folder}: transformers did not find or not want {astray[0]} ({len(astray)} weights in all)"
        )
    tokens = model.eval()(images).last_hidden_state
    return {CLASS: tokens[:, 0], PATCHES: tokens[:, 1:]}


def usage(model: Exported, folder: str) -> str:
    """How transformers loads it."""
    return f"""\
from transformers import AutoImageProcessor, ViTModel

processor = AutoImageProcessor.from_pretrained("{folder}")
model = ViTModel.from_pretrained("{folder}").eval()

# images [B, {model.shape}]: processor(pictures, return_tensors="pt")["pixel_values"]
tokens = model(images).last_hidden_state  # [B, 1 + {model.network.patch_embed.num_patches}, {model.dim}], the class token first
features = tokens[:, 1:].mean(1)  # [B, {model.dim}]; the model's own pooler_output is the class token as it is
"""


def _foreign_part(network: Any) -> str:
    """A part that transformers' ViT has no place for, in words; '' when there is none."""
    if type(network) is not VisionTransformer:
        return "rotary positions"
    names = network.state_dict()
    for name in names:
        if not any(re.fullmatch(known, name) for known in NAMES):
            return next((what for part, what in FOREIGN.items() if part in name), f"the weights {name}")
    if network.cls_token is None:
        return "no class token"
    if network.pos_embed is None or network.pos_embed.shape[1] != 1 + network.patch_embed.num_patches:
        return "no position of the class token"
    if "norm.weight" not in names or "patch_embed.proj.bias" not in names:
        return "no final norm" if "norm.weight" not in names else "a patch projection without bias"
    usual = all(
        type(block) is Block and type(block.mlp) is Mlp and type(block.mlp.act) in ACTIVATIONS
        for block in network.blocks
    )
    return "" if usual else "blocks of another kind"


def _processor(model: Exported, transformers: Any) -> Any:
    """Brings pictures to the encoder as pre-training had them."""
    size = {"height": model.image_size, "width": model.image_size}
    shared = {
        "resample": BICUBIC, "image_mean": list(model.mean), "image_std": list(model.std), "do_convert_rgb": model.channels == 3,
    }  # fmt: skip
    if model.crop == "whole":
        return transformers.ViTImageProcessor(size=size, **shared)
    return transformers.BitImageProcessor(size={"shortest_edge": model.image_size}, crop_size=size, **shared)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's own bars and notes."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


TRANSFORMERS = Format("transformers", check, write, read, usage)

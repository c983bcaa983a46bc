"""The layout of transformers' ViTModel: the same weights under other names, and a matching image processor."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.layers import Mlp, QuickGELU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from fastmae.config import ExportConfig
from fastmae.errors import FailedCheckError, InputError
from fastmae.exporting.export_format import ExportFormat, import_extra
from fastmae.exporting.exported_model import CLASS, PATCHES, ExportedModel
from fastmae.exporting.output_folder import write_weights
from fastmae.runs.timm_config import EXPORT_WEIGHTS

ACTIVATIONS: dict[type[nn.Module], str] = {nn.GELU: "gelu", QuickGELU: "quick_gelu"}
WEIGHT_NAMES = {
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
"""Pattern of timm's names -> the name in transformers' files. Transformers' ViT has no place for any other weight."""
UNSUPPORTED_WEIGHTS = {
    "reg_token": "register tokens",
    ".ls1.": "layer scale",
    ".q_norm.": "normalised queries and keys",
    "norm_pre.": "a norm before the blocks",
    "fc_norm.": "a norm after pooling",
}
"""Part of timm's name -> in words, for weights that transformers' ViT has no place for."""
BICUBIC = 3
"""Pillow's number of bicubic resampling, as transformers' processors store it."""


def check(model: ExportedModel) -> None:
    """Check that transformers' ViT can hold the encoder.

    Raises:
        InputError: it can't, or transformers is not installed.
    """
    import_extra("transformers")
    if model.classes:
        raise InputError("--classifier: transformers' classifiers read the class token; use --format timm or onnx")
    if not model.is_vit:
        raise InputError(
            f"--format transformers: {model.source} ({model.architecture}) is no plain ViT; use --format timm or onnx"
        )
    misfit = _misfit(model.network)
    if misfit:
        raise InputError(
            f"--format transformers: {model.source} ({model.architecture}) does not fit transformers' ViT, "
            f"since it has {misfit}; use --format timm or onnx"
        )


def write(model: ExportedModel, folder: Path, _: ExportConfig) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json."""
    transformers, network = import_extra("transformers"), model.network
    block = network.blocks[0]
    config = transformers.ViTConfig(
        hidden_size=network.embed_dim,
        num_hidden_layers=len(network.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        hidden_act=ACTIVATIONS[type(block.mlp.act)],
        layer_norm_eps=block.norm1.eps,
        image_size=model.image_size,
        patch_size=model.patch_size,
        encoder_stride=model.patch_size,
        num_channels=model.channels,
        qkv_bias=block.attn.qkv.bias is not None,
        pooler_act="linear",
        architectures=["ViTModel"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    write_weights(folder / EXPORT_WEIGHTS, renamed_weights(network))
    _processor(model, transformers).save_pretrained(folder)


def renamed_weights(network: Any) -> dict[str, torch.Tensor]:
    """The encoder's weights under transformers' names.

    ViTModel has a pooler, which pre-training here does not train. Its weights are set to the identity, so that
    `pooler_output` is the class token and not a product with random numbers.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in network.state_dict().items():
        pattern = next(pattern for pattern in WEIGHT_NAMES if re.fullmatch(pattern, name))
        new_name = re.sub(pattern, WEIGHT_NAMES[pattern], name)
        if "{}" in new_name:  # timm keeps query, key and value in one matrix
            for projection, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                weights[new_name.format(projection)] = rows
        else:
            weights[new_name] = tensor
    width = network.embed_dim
    weights |= {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
    return {name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}


@torch.inference_mode()
def read(folder: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Class token and patch tokens, from the ViTModel that transformers builds from the folder.

    Raises:
        FailedCheckError: a weight is missing from the files, or is not used.
    """
    transformers = import_extra("transformers")
    with _quiet(transformers):
        model, loading = transformers.ViTModel.from_pretrained(
            folder, output_loading_info=True, trust_remote_code=False
        )
        transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    mismatches = [*loading["missing_keys"], *loading["unexpected_keys"], *loading["mismatched_keys"]]
    if mismatches:
        raise FailedCheckError(
            f"{folder}: {len(mismatches)} weights do not match transformers' model, the first is {mismatches[0]}"
        )
    tokens = model.eval()(images).last_hidden_state
    return {CLASS: tokens[:, 0], PATCHES: tokens[:, 1:]}


def usage(model: ExportedModel, folder: str) -> str:
    """Python code that loads the folder with transformers."""
    patches = model.network.patch_embed.num_patches
    return f"""\
from transformers import AutoImageProcessor, ViTModel

processor = AutoImageProcessor.from_pretrained("{folder}")
model = ViTModel.from_pretrained("{folder}").eval()

# images [B, {model.image_shape}]: processor(pictures, return_tensors="pt")["pixel_values"]
tokens = model(images).last_hidden_state  # [B, 1 + {patches}, {model.dim}]: class token, patch tokens
features = tokens[:, 1:].mean(1)  # [B, {model.dim}]; the model's own pooler_output is the class token
"""


def _misfit(network: Any) -> str:
    """What transformers' ViT does not support in a network, in words that follow "it has"; '' if everything fits."""
    if type(network) is not VisionTransformer:
        return "rotary positions"
    names = list(network.state_dict())
    for name in names:
        if not any(re.fullmatch(pattern, name) for pattern in WEIGHT_NAMES):
            return next((words for part, words in UNSUPPORTED_WEIGHTS.items() if part in name), f"weights {name}")
    positions = 1 + network.patch_embed.num_patches
    misfits = {
        "no class token": network.cls_token is None,
        "no position embedding for the class token": (
            network.pos_embed is None or network.pos_embed.shape[1] != positions
        ),
        "no final norm": "norm.weight" not in names,
        "a patch projection without bias": "patch_embed.proj.bias" not in names,
        "blocks of another kind": not all(
            type(block) is Block and type(block.mlp) is Mlp and type(block.mlp.act) in ACTIVATIONS
            for block in network.blocks
        ),
    }
    return next((words for words, applies in misfits.items() if applies), "")


def _processor(model: ExportedModel, transformers: Any) -> Any:
    """The image processor that prepares pictures as `model` expects them."""
    size = {"height": model.image_size, "width": model.image_size}
    shared = {
        "resample": BICUBIC,
        "image_mean": list(model.mean),
        "image_std": list(model.std),
        "do_convert_rgb": model.channels == 3,
    }
    if model.crop == "whole":
        return transformers.ViTImageProcessor(size=size, **shared)
    return transformers.BitImageProcessor(size={"shortest_edge": model.image_size}, crop_size=size, **shared)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence transformers' progress bars and messages."""
    logging = transformers.utils.logging
    level, bars_enabled = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars_enabled:
            logging.enable_progress_bar()


TRANSFORMERS = ExportFormat("transformers", check, write, read, usage)

"""The layout of transformers' ViTModel: the same weights under other names, and a matching image processor."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmae.config import ExportConfig
from fastmae.errors import FailedCheckError, InputError
from fastmae.exporting.export_format import ExportFormat, import_extra
from fastmae.exporting.exported_model import CLASS, PATCHES, ExportedModel
from fastmae.exporting.output_folder import write_weights
from fastmae.exporting.vit_layout import ACTIVATIONS, check_layout, renamed
from fastmae.runs.timm_config import EXPORT_WEIGHTS

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
    check_layout(model, "transformers", "transformers", WEIGHT_NAMES, _misfits)


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
        new_name = renamed(name, WEIGHT_NAMES)
        if "{}" in new_name:  # timm keeps query, key and value in one matrix
            for projection, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                weights[new_name.format(projection)] = rows
        else:
            weights[new_name] = tensor
    width = network.embed_dim
    weights |= {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
    return {name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}


@torch.inference_mode()
def read(_: ExportedModel, folder: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
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


def _misfits(network: Any) -> dict[str, bool]:
    """What transformers' ViT does not support, in words that follow "it has" -> whether a network has it."""
    positions = 1 + network.patch_embed.num_patches
    return {
        "no class token": network.cls_token is None,
        "no position embedding for the class token": network.pos_embed.shape[1] != positions,
        "no final norm": isinstance(network.norm, nn.Identity),
        "a patch projection without bias": network.patch_embed.proj.bias is None,
    }


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

"""file/PATH: a ViT's checkpoint as its authors publish it. MAE, DINO, iBOT and timm give their tensors the same names; they
differ in what lies around them, and the architecture follows from the shapes."""

from pathlib import Path
from typing import Any

import timm
import torch

from fastmae.errors import InputError
from fastmae.teachers.weights import load_strictly, read_weights

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""Width -> attention heads of the published ViTs (Ti, S, B, L, H): shapes don't tell them."""
PREFIXES = ("module.", "backbone.", "encoder.")
"""Of DataParallel, of DINO's and iBOT's students and teachers, of others."""
NOT_ENCODER = ("decoder_", "mask_token", "masked_embed", "head.", "fc.", "predictor.", "projector.")
"""MAE's decoder, iBOT's mask, and the heads of all."""


def load_checkpoint_file(path: Path, **extra: Any) -> tuple[Any, str]:
    """The encoder in a checkpoint, as a timm VisionTransformer with a class token; normalised with ImageNet's mean and deviation.

    Args:
        path: of the checkpoint.
        extra: arguments of timm's besides.

    Returns:
        The model, and the file.

    Raises:
        InputError: no plain ViT in it, or one of a width that says nothing of its heads.
    """
    state = encoder_state(read_weights(path))
    if not {"patch_embed.proj.weight", "pos_embed", "cls_token", "blocks.0.mlp.fc1.weight"} <= state.keys():
        raise InputError(
            f"{path}: no ViT in the layout of MAE, DINO, iBOT or timm; for another one give --teacher timm/NAME --teacher-weights {path}"
        )
    width, colours, patch, _ = state["patch_embed.proj.weight"].shape
    if width not in HEADS or colours != 3:
        raise InputError(
            f"{path}: a ViT of width {width}; name the model that it is: --teacher timm/NAME --teacher-weights {path}"
        )
    grid = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    arguments = {
        "num_classes": 0,
        "img_size": grid * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "num_heads": HEADS[width],
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "global_pool": "avg" if "fc_norm.weight" in state else "token",
    }
    model: Any = timm.create_model("vit_base_patch16_224", **arguments, **extra)
    load_strictly(model, state, path)
    imagenet = {
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "input_size": (3, grid * patch, grid * patch),
    }
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        **imagenet,
        "architecture": "vit_base_patch16_224",
        "arguments": arguments,
    }
    return model, str(path.absolute())


def encoder_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A training checkpoint's tensors -> the encoder's own, under timm's names."""
    kept = {}
    for name, tensor in state.items():
        bare = name
        while bare.startswith(PREFIXES):
            bare = bare.split(".", 1)[1]
        if not bare.startswith(NOT_ENCODER):
            kept[bare] = tensor
    return kept

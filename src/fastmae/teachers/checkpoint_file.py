"""file/PATH: a ViT's checkpoint as its authors publish it.

MAE, DINO, iBOT and timm give the encoder's tensors the same names. They differ in what lies around them, and the
architecture follows from the tensors' shapes.
"""

from pathlib import Path
from typing import Any

from fastmae.errors import InputError
from fastmae.images.views import IMAGENET_MEAN, IMAGENET_STD
from fastmae.outside.networks import network_of
from fastmae.outside.tensors import Weights
from fastmae.teachers.weights import is_bookkeeping, prefix_of, read_weights

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""Width -> number of attention heads in the published ViTs (Ti, S, B, L, H). The shapes do not tell it."""
NOT_ENCODER = ("decoder_", "mask_token", "masked_embed", "head.", "fc.", "predictor.", "projector.")
"""Tensors besides the encoder: MAE's decoder, iBOT's mask token, and heads."""
ENCODER_TENSORS = {"patch_embed.proj.weight": 4, "pos_embed": 3, "cls_token": 3, "blocks.0.mlp.fc1.weight": 2}
"""Tensors that every plain ViT with a class token has -> number of their dimensions."""
ARCHITECTURE = "vit_base_patch16_224"
"""timm's model whose sizes are replaced by those of the checkpoint."""


def load_checkpoint_file(path: Path, **extra: Any) -> tuple[Any, str]:
    """The encoder in a checkpoint, as a timm VisionTransformer with a class token and ImageNet's normalisation.

    Args:
        path: the checkpoint.
        extra: more arguments for timm's model.

    Returns:
        The model, and the absolute path of the file.

    Raises:
        InputError: no plain ViT in it, or a width for which the number of heads is unknown.
    """
    state = encoder_state(read_weights(path), path)
    dimensions = {name: state[name].dim() for name in ENCODER_TENSORS if name in state}
    if dimensions != ENCODER_TENSORS:
        raise InputError(
            f"{path}: no ViT in the layout of MAE, DINO, iBOT or timm; for another one give --teacher timm/NAME "
            f"--teacher-weights {path}"
        )
    width, channels, patch_size, _ = state["patch_embed.proj.weight"].shape
    if width not in HEADS or channels != 3:
        raise InputError(
            f"{path}: a ViT of width {width}; name the model that it is: --teacher timm/NAME --teacher-weights {path}"
        )
    grid = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    image_size = grid * patch_size
    arguments = {
        "num_classes": 0,
        "img_size": image_size,
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "num_heads": HEADS[width],
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "global_pool": "avg" if "fc_norm.weight" in state else "token",
    }
    model = network_of(ARCHITECTURE, arguments, path, state, **extra)
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "input_size": (3, image_size, image_size),
        "architecture": ARCHITECTURE,
        "arguments": arguments,
    }
    return model, str(path.absolute())


def encoder_state(state: Weights, path: Path) -> Weights:
    """The encoder's tensors out of a training checkpoint, under timm's names.

    Raises:
        InputError: several encoders in it.
    """
    prefix = prefix_of(ENCODER_TENSORS, state, path)
    below = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {
        name: tensor for name, tensor in below.items() if not (name.startswith(NOT_ENCODER) or is_bookkeeping(tensor))
    }

"""A picture of where the encoder's last block looks: the attention of the class token to the patches."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps

from fastmae.errors import InputError
from fastmae.images.views import normalise
from fastmae.pretraining.image_grid import displayable, image_grid_png
from fastmae.pretraining.knn_every import CentreViews
from fastmae.student.encoder import is_plain_vit
from fastmae.tokens import TokenStore

HEADS_SHOWN = 3


@torch.no_grad()
def attention_maps_png(encoder: Any, store: TokenStore, images: int) -> bytes:
    """One row for each image: the central view, the mean attention of all heads, and the heads with the sharpest one.

    Args:
        encoder: a timm VisionTransformer with a class token, in evaluation mode; any other network is refused.
        store: token store; the images are taken at equal distances in it.
        images: number of rows.

    Raises:
        InputError: the encoder is no plain ViT, has no class token, or rotates its queries and keys (RoPE).
    """
    if not is_plain_vit(encoder):
        raise InputError("this encoder is no plain ViT")
    attention = getattr(encoder.blocks[-1], "attn", None)
    if getattr(encoder, "cls_token", None) is None:
        raise InputError("this encoder has no class token")
    if attention is None or not hasattr(attention, "qkv") or getattr(encoder, "rope", None) is not None:
        raise InputError("this encoder's attention has rotary positions or a layout of its own")
    indices = np.linspace(0, len(store) - 1, images).round().astype(np.int64)
    centre_views = CentreViews(store, indices, encoder.patch_embed.img_size[0])
    pixels = torch.stack([centre_views[row] for row in range(images)])
    weights = _class_attention(encoder, normalise(pixels, *store.normalisation))
    sharpest = weights.std(-1).mean(0).topk(min(HEADS_SHOWN, attention.num_heads)).indices.sort().values.tolist()

    views, grid = displayable(pixels), encoder.patch_embed.grid_size
    columns = {"view": views.numpy(), "all heads": _overlay(views, weights.mean(1), grid)}
    for head in sharpest:
        columns[f"head {head + 1}"] = _overlay(views, weights[:, head], grid)
    return image_grid_png(columns)


def _class_attention(encoder: Any, images: torch.Tensor) -> torch.Tensor:
    """Softmax attention [B, heads, N] of the class token to the patches, in the last block.

    timm's fused attention does not return its weights. They are computed again from the block's queries and keys.
    """
    attention = encoder.blocks[-1].attn
    outputs: list[torch.Tensor] = []
    handle = attention.qkv.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        encoder.forward_features(images)
    finally:
        handle.remove()
    query, key, _ = outputs[0].unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    query, key = attention.q_norm(query), attention.k_norm(key)
    class_query = query[:, :, :1]
    weights = (class_query @ key.transpose(-2, -1) * attention.scale).softmax(-1)
    return weights[:, :, 0, encoder.num_prefix_tokens :]


def _overlay(views: torch.Tensor, weights: torch.Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Weights [B, N] as heat maps over the views [B, H, W, 3] in grey. Each map is scaled to its own range."""
    low, high = weights.amin(1, keepdim=True), weights.amax(1, keepdim=True)
    heat = ((weights - low) / (high - low).clamp(min=1e-9)).view(-1, 1, *grid)
    heat = F.interpolate(heat, size=views.shape[1:3], mode="bilinear", align_corners=False)[:, 0]
    colours = torch.from_numpy(colormaps["inferno"](heat.numpy())[..., :3]).float()
    return (0.35 * views.mean(-1, keepdim=True) + 0.65 * colours).numpy()

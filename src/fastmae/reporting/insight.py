"""What an encoder looks at, and what it takes for alike: attention of the last block, and nearest neighbours. A PNG's bytes each."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps

from fastmae.errors import InputError
from fastmae.images.views import normalise
from fastmae.pretraining.knn_every import MiddleViews
from fastmae.probes.embed import embed_pictures, embed_with_encoder
from fastmae.reporting.pictures import as_shown, grid_of_pictures
from fastmae.tokens import TokenStore

NEIGHBOURS = 6
HEADS_SHOWN = 3


@torch.no_grad()
def attention_maps(encoder: Any, store: TokenStore, images: int) -> bytes:
    """A row an image: the view, what the last block's class token attends to (mean of the heads), and the heads that differ most.

    Args:
        encoder: a timm VisionTransformer with a class token.
        store: of the images, from all over which views of the middle are taken.
        images: how many rows.

    Raises:
        InputError: an encoder whose attention can't be read this way.
    """
    attention = encoder.blocks[-1].attn
    if (
        getattr(encoder, "cls_token", None) is None
        or not hasattr(attention, "qkv")
        or getattr(encoder, "rope", None) is not None
    ):
        raise InputError("this encoder has no class token, or turns its queries by their place")
    pixels = _middles(store, images, encoder.patch_embed.img_size[0])
    with _kept(attention.qkv) as kept:
        encoder.forward_features(normalise(pixels, *store.normalisation))
    query, key, _ = kept[0].unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    query, key = attention.q_norm(query), attention.k_norm(key)
    weights = (query[:, :, :1] @ key.transpose(-2, -1) * attention.scale).softmax(-1)[
        :, :, 0, encoder.num_prefix_tokens :
    ]
    spread = weights.std(-1).mean(0).topk(min(HEADS_SHOWN, attention.num_heads)).indices.sort().values.tolist()
    shown = as_shown(pixels)
    columns = {"view": shown.numpy(), "all heads": _over(shown, weights.mean(1), encoder.patch_embed.grid_size)}
    columns |= {f"head {head + 1}": _over(shown, weights[:, head], encoder.patch_embed.grid_size) for head in spread}
    return grid_of_pictures(columns)


@torch.no_grad()
def nearest_neighbours(encoder: Any, store: TokenStore, queries: int, gallery: int) -> bytes:
    """A row a query: the view, and those of other images whose mean patch tokens are nearest by cosine, with the cosine.

    Args:
        encoder: in evaluation mode, on the CPU.
        store: of the images.
        queries: how many rows.
        gallery: images from all over the store that are looked among.
    """
    size = encoder.patch_embed.img_size[0]
    chosen = np.unique(np.linspace(0, len(store) - 1, min(gallery, len(store))).round().astype(np.int64))
    views = MiddleViews(store, chosen, size)
    embed = embed_with_encoder(encoder, "mean", None, *store.normalisation)
    features = F.normalize(
        embed_pictures(views, len(chosen), embed, torch.device("cpu"), 64, 0, "neighbours", quiet=True), dim=1
    )
    asked = np.linspace(0, len(chosen) - 1, queries + 2)[1:-1].round().astype(int)
    nearest = (features[asked] @ features.T).topk(min(NEIGHBOURS, len(chosen)), dim=1).indices
    columns = {
        ("view" if rank == 0 else f"nearest {rank}"): as_shown(
            torch.stack([views[int(place)] for place in nearest[:, rank]])
        ).numpy()
        for rank in range(nearest.shape[1])
    }
    return grid_of_pictures(columns)


def _middles(store: TokenStore, images: int, size: int) -> torch.Tensor:
    indices = np.linspace(0, len(store) - 1, images).round().astype(np.int64)
    views = MiddleViews(store, indices, size)
    return torch.stack([views[place] for place in range(images)])


def _over(shown: torch.Tensor, weights: torch.Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Weights [B, N] as a glow over pictures [B, H, W, 3], each from its own least to its own most."""
    low, high = weights.amin(1, keepdim=True), weights.amax(1, keepdim=True)
    heat = ((weights - low) / (high - low).clamp(min=1e-9)).view(-1, 1, *grid)
    heat = F.interpolate(heat, size=shown.shape[1:3], mode="bilinear", align_corners=False)[:, 0]
    glow = torch.from_numpy(colormaps["inferno"](heat.numpy())[..., :3]).float()
    return (0.35 * shown.mean(-1, keepdim=True) + 0.65 * glow).numpy()


@contextmanager
def _kept(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """What a module gives, while it is within."""
    kept: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _module, _given, found: kept.append(found))
    try:
        yield kept
    finally:
        handle.remove()

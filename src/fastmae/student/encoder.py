"""The encoder: a timm ViT that embeds and encodes the visible patches only (Sec. 3.2.4).

Shapes: B views, N patches a view, V of them visible, D the width, K the image channels.
"""

from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models import is_model_in_modules
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fastmae.errors import InputError
from fastmae.runtime.fast_linear import linear

Encoder = Any
"""A timm ViT: its attributes differ between its kinds, and nn.Module types them as Tensor or Module."""


LayerNorm: Any = partial(nn.LayerNorm, eps=1e-6)


class ProjectVisible(nn.Conv2d):
    """timm's patch projection, a convolution of stride and kernel P, that computes only the patches whose ids_keep are set.

    The other ids_keep are left zero: `KeepVisible` drops them right after the positions were added. At 75 % masked this saves
    three quarters of the projection: 1 % of the FLOPs of a ViT-B's step. Its parameters, their names and shapes are the convolution's.
    """

    ids_keep: torch.Tensor | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, K, H, W] -> [B, D, H / P, W / P]; all of it when no ids_keep are set."""
        if self.ids_keep is None:
            return super().forward(images)
        patch = self.kernel_size[0]
        batch, _, height, width = images.shape
        visible = gather_patches(F.unfold(images, patch, stride=patch).transpose(1, 2), self.ids_keep)
        projected = linear(visible, self.weight.flatten(1), self.bias)
        ids_keep = self.ids_keep.unsqueeze(-1).expand_as(projected)
        whole = projected.new_zeros(batch, height // patch * (width // patch), self.out_channels).scatter(
            1, ids_keep, projected
        )
        return whole.transpose(1, 2).unflatten(2, (height // patch, width // patch))


class KeepVisible(nn.Module):
    """Sits in the `patch_drop` slot of timm's ViTs and keeps the patches whose ids_keep `Student.encode` set.

    Args:
        prefix_tokens: class and register tokens, always kept.
        return_ids_keep: give the ids_keep too, as timm's Eva wants them, to turn its rotary positions likewise.
    """

    def __init__(self, prefix_tokens: int, return_ids_keep: bool):
        super().__init__()
        self.prefix_tokens, self.return_ids_keep = prefix_tokens, return_ids_keep
        self.ids_keep: torch.Tensor | None = None

    def forward(self, tokens: torch.Tensor) -> Any:
        """[B, prefix + N, D] -> [B, prefix + V, D]; all of them when no ids_keep are set."""
        if self.ids_keep is not None:
            prefix, patches = tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]
            tokens = torch.cat([prefix, gather_patches(patches, self.ids_keep)], dim=1)
        return (tokens, self.ids_keep) if self.return_ids_keep else tokens


def build_encoder(
    name: str,
    image_size: int,
    patch_size: int,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    channels: int = 3,
    **extra: Any,
) -> Encoder:
    """A timm ViT at random, with fixed sin-cos positions as MAE has them.

    Args:
        name: any vit_* of timm.
        image_size: side of a view, in pixels.
        patch_size: side of a patch, in pixels.
        width: another width than the name's, D.
        depth: another number of blocks.
        heads: another number of heads.
        channels: of the images.
        extra: arguments of timm's besides, for use after pre-training (`dynamic_img_size`, `drop_path_rate`).

    Raises:
        InputError: no such ViT, or sizes that don't divide.
    """
    if not name.startswith("vit_") or name not in timm.list_models("vit_*"):
        raise InputError(
            f"--encoder {name}: not one of timm's vit_* names (vit_tiny_patch16_224, vit_base_patch16_224, ...)"
        )
    if image_size % patch_size:
        fitting = max(patch_size, image_size // patch_size * patch_size)
        raise InputError(
            f"--image-size {image_size}: not a multiple of the store's patch size {patch_size}; take {fitting}"
        )
    rotary = is_model_in_modules(name, ["eva"])
    arguments = timm_arguments(name, image_size, patch_size, width, depth, heads, channels)
    try:
        encoder: Encoder = timm.create_model(name, pretrained=False, **arguments, **extra)
    except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"--encoder {name}: timm can't build it with these sizes ({' '.join(str(error).split())})"
        ) from error
    side = image_size // patch_size
    if type(encoder) not in (VisionTransformer, Eva) or tuple(encoder.patch_embed.grid_size) != (side, side):
        raise InputError(
            f"--encoder {name}: its positions or its convolutional stem don't allow masking before the encoder; take a plain ViT"
        )
    encoder.patch_embed.proj = _projection(ProjectVisible, encoder.patch_embed.proj)
    encoder.patch_drop = KeepVisible(encoder.num_prefix_tokens, return_ids_keep=rotary)
    encoder.apply(initialise_linear)
    nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.flatten(1))  # MAE treats the projection as a linear layer
    if encoder.pos_embed is not None:
        prefix = encoder.pos_embed.shape[1] - encoder.patch_embed.num_patches
        positions = sincos_positions(encoder.patch_embed.grid_size, encoder.embed_dim)
        encoder.pos_embed = nn.Parameter(F.pad(positions, (0, 0, prefix, 0))[None], requires_grad=False)
    return encoder


def timm_arguments(
    name: str, image_size: int, patch_size: int, width: int | None, depth: int | None, heads: int | None, channels: int
) -> dict[str, Any]:
    """What `timm.create_model(name, **arguments)` takes for a network with the parameters of `build_encoder`'s, by the same names."""
    # The final norm over all tokens, before pooling, whatever the name's own head has.
    head: dict[str, Any] = {
        "global_pool": "avg",
        "use_fc_norm" if is_model_in_modules(name, ["eva"]) else "fc_norm": False,
    }
    changed = {
        key: value
        for key, value in {"embed_dim": width, "depth": depth, "num_heads": heads}.items()
        if value is not None
    }
    return {"num_classes": 0, "img_size": image_size, "patch_size": patch_size, "in_chans": channels, **head, **changed}


def without_masking(encoder: Encoder) -> Encoder:
    """The encoder as timm makes it, for use after pre-training."""
    encoder.patch_embed.proj = _projection(nn.Conv2d, encoder.patch_embed.proj)
    encoder.patch_drop = None if encoder.patch_drop.return_ids_keep else nn.Identity()
    return encoder


def sincos_positions(grid: tuple[int, int], width: int) -> torch.Tensor:
    """Fixed 2-D sin-cos position embeddings, float32 [rows * cols, width] (MAE, after Vaswani et al.)."""
    if width % 4:
        raise InputError(f"width {width}: sin-cos positions need a multiple of 4")
    return build_sincos2d_pos_embed(list(grid), dim=width)


def visible_patches(patches: int, mask_ratio: float) -> int:
    """How many of the patches the encoder sees: 49 of 196 at 0.75.

    Raises:
        InputError: a ratio that leaves nothing visible or nothing masked.
    """
    visible = int(patches * (1 - mask_ratio)) if 0 < mask_ratio < 1 else 0
    if visible == 0:
        raise InputError(
            f"--mask-ratio {mask_ratio}: of {patches} patches {visible} would be visible; give more than 0 and less than 1"
        )
    return visible


def gather_patches(tokens: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
    """tokens [B, N, K] at ids_keep [B, V] -> [B, V, K]."""
    return tokens.gather(1, ids_keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _projection(kind: type[nn.Conv2d], projection: nn.Conv2d) -> nn.Conv2d:
    """The same patch projection as another class: it takes over the parameters themselves."""
    size = int(projection.kernel_size[0])
    own = kind(
        projection.in_channels, projection.out_channels, size, size, bias=projection.bias is not None, device="meta"
    )
    own.weight, own.bias = projection.weight, projection.bias
    return own


def initialise_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

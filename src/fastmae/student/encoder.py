"""The plain ViT as an encoder: timm's, which embeds and encodes only the visible patches (Sec. 3.2.4).

Shapes: B views, N patches per view, V visible ones, D the width, K the image channels, P the side of a patch.
"""

from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, build_sincos2d_pos_embed
from timm.models import is_model_in_modules
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fastmae.errors import InputError
from fastmae.runtime.fast_linear import linear

Encoder = Any
"""A network of timm. Its attributes depend on its class, and nn.Module types them all as Tensor or Module."""

LayerNorm: Any = partial(nn.LayerNorm, eps=1e-6)


class ProjectVisible(nn.Conv2d):
    """timm's patch projection, a convolution with kernel size and stride P, for the patches in `ids_keep` only.

    The other patches are left zero; `KeepVisible` drops them right after the positions were added. With 75 % of the
    patches masked, this saves three quarters of the projection: 1 % of the FLOPs of a ViT-B's step. The parameters,
    their names and their shapes are the convolution's.
    """

    ids_keep: torch.Tensor | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, K, H, W] -> [B, D, H / P, W / P]; all patches while `ids_keep` is None."""
        if self.ids_keep is None:
            return super().forward(images)
        patch_size = self.kernel_size[0]
        batch, _, height, width = images.shape
        rows, cols = height // patch_size, width // patch_size
        # Cut into patches [B, N, K * P * P], keep the visible ones, project them: [B, V, D].
        patches = F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)
        visible = gather_patches(patches, self.ids_keep)
        tokens = linear(visible, self.weight.flatten(1), self.bias)
        # Put them back into the whole grid, as timm's ViT expects it: [B, N, D] -> [B, D, H / P, W / P].
        ids_keep = self.ids_keep.unsqueeze(-1).expand_as(tokens)
        grid = tokens.new_zeros(batch, rows * cols, self.out_channels).scatter(1, ids_keep, tokens)
        return grid.transpose(1, 2).unflatten(2, (rows, cols))


class KeepVisible(nn.Module):
    """Takes the `patch_drop` slot of timm's ViTs, and keeps the patches in `ids_keep`, which `Student.encode` sets.

    Args:
        prefix_tokens: number of class and register tokens, which are always kept.
        return_ids_keep: return `ids_keep` too: timm's Eva selects its rotary positions by them.
    """

    def __init__(self, prefix_tokens: int, return_ids_keep: bool):
        super().__init__()
        self.prefix_tokens, self.return_ids_keep = prefix_tokens, return_ids_keep
        self.ids_keep: torch.Tensor | None = None

    def forward(self, tokens: torch.Tensor) -> Any:
        """[B, prefix + N, D] -> [B, prefix + V, D]; all patches while `ids_keep` is None."""
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
    """A timm ViT with random weights and MAE's fixed sin-cos positions.

    Args:
        name: any vit_* name of timm, with or without timm/ in front.
        image_size: side of a view, in pixels.
        patch_size: side of a patch, in pixels.
        width: D, instead of the name's own.
        depth: number of blocks, instead of the name's own.
        heads: number of attention heads, instead of the name's own.
        channels: image channels.
        extra: more arguments of timm's, for use after pre-training (`dynamic_img_size`, `drop_path_rate`).

    Raises:
        InputError: no such ViT, or sizes that don't divide.
    """
    architecture = architecture_of(name)
    if architecture not in timm.list_models("vit_*"):
        raise InputError(
            f"--encoder {name}: not one of timm's vit_* names (vit_tiny_patch16_224, vit_base_patch16_224, ...)"
        )
    check_grid(image_size, patch_size)
    arguments = timm_arguments(name, image_size, patch_size, width, depth, heads, channels)
    try:
        encoder: Encoder = timm.create_model(architecture, pretrained=False, **arguments, **extra)
    except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        cause = " ".join(str(error).split())
        raise InputError(f"--encoder {name}: timm can't build it with these sizes ({cause})") from error
    side = image_size // patch_size
    if type(encoder) not in (VisionTransformer, Eva) or tuple(encoder.patch_embed.grid_size) != (side, side):
        raise InputError(
            f"--encoder {name}: its positions or its convolutional stem rule out masking before the encoder; "
            f"use a plain ViT"
        )
    # Mask before the encoder.
    encoder.patch_embed.proj = _projection(ProjectVisible, encoder.patch_embed.proj)
    encoder.patch_drop = KeepVisible(encoder.num_prefix_tokens, return_ids_keep=_is_eva(name))
    # MAE's initialisation, which treats the patch projection as a linear layer.
    encoder.apply(initialise_linear)
    nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.flatten(1))
    # Fixed positions for the patches, zero for the prefix tokens. Rotary ViTs may have no position embedding.
    if encoder.pos_embed is not None:
        prefix = encoder.pos_embed.shape[1] - encoder.patch_embed.num_patches
        positions = sincos_positions(encoder.patch_embed.grid_size, encoder.embed_dim)
        encoder.pos_embed = nn.Parameter(F.pad(positions, (0, 0, prefix, 0))[None], requires_grad=False)
    return encoder


def check_grid(image_size: int, patch_size: int) -> None:
    """Check that a view consists of whole patches.

    Raises:
        InputError: it does not.
    """
    if image_size % patch_size:
        multiple = max(patch_size, image_size // patch_size * patch_size)
        raise InputError(
            f"--image-size {image_size}: not a multiple of the store's patch size {patch_size}; use {multiple}"
        )


def timm_arguments(
    name: str, image_size: int, patch_size: int, width: int | None, depth: int | None, heads: int | None, channels: int
) -> dict[str, Any]:
    """Arguments for `timm.create_model`, whose parameters then have `build_encoder`'s names and shapes."""
    sizes = {"embed_dim": width, "depth": depth, "num_heads": heads}
    return {
        "num_classes": 0,
        "img_size": image_size,
        "patch_size": patch_size,
        "in_chans": channels,
        # The final norm comes before pooling and normalises all tokens, whichever head the name has by default.
        "global_pool": "avg",
        "use_fc_norm" if _is_eva(name) else "fc_norm": False,
        **{argument: size for argument, size in sizes.items() if size is not None},
    }


def without_masking(encoder: Encoder) -> Encoder:
    """The encoder with timm's own modules again, for use after pre-training."""
    encoder.patch_embed.proj = _projection(nn.Conv2d, encoder.patch_embed.proj)
    encoder.patch_drop = None if encoder.patch_drop.return_ids_keep else nn.Identity()
    return encoder


def sincos_positions(grid: tuple[int, int], width: int) -> torch.Tensor:
    """Fixed 2-D sin-cos position embeddings, float32 [rows * cols, width] (MAE, after Vaswani et al.).

    Raises:
        InputError: the width is not a multiple of 4.
    """
    if width % 4:
        raise InputError(f"width {width}: sin-cos positions need a multiple of 4")
    return build_sincos2d_pos_embed(list(grid), dim=width)


def visible_patches(patches: int, mask_ratio: float) -> int:
    """Number of patches that the encoder sees: 49 of 196 at 0.75; all at 0.

    Raises:
        InputError: no patch would be visible, or a ratio above 0 masks none.
    """
    visible = int(patches * (1 - mask_ratio))
    if not 0 < visible < patches and mask_ratio:
        raise InputError(f"--mask-ratio {mask_ratio}: leaves {visible} of {patches} patches visible")
    return visible


def gather_patches(tokens: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
    """tokens [B, N, C] at ids_keep [B, V] -> [B, V, C]."""
    return tokens.gather(1, ids_keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def initialise_linear(module: nn.Module) -> None:
    """Xavier-uniform weight and zero bias, as in MAE; modules other than linear layers stay as they are."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def architecture_of(name: str) -> str:
    """timm's name of `timm/NAME` or NAME."""
    return name.removeprefix("timm/")


def names_plain_vit(name: str) -> bool:
    """Whether a name is that of a ViT that `build_encoder` can mask: a vit_* that timm builds as a plain one."""
    architecture = architecture_of(name)
    return architecture.startswith("vit_") and is_model_in_modules(architecture, ["vision_transformer", "eva"])


def is_plain_vit(network: Encoder) -> bool:
    """Whether a network is a plain ViT: one token for each patch, straight from the pixels."""
    return type(network) in (VisionTransformer, Eva) and isinstance(network.patch_embed, PatchEmbed)


def layer_numbers(layers: str, depth: int) -> list[int]:
    """`--relation-layers` as numbers from 0, in order and each once.

    Args:
        layers: 'last', 'all', or numbers separated by commas.
        depth: number of the encoder's layers.

    Raises:
        InputError: something else, or the encoder has no such layer.
    """
    named = {"last": range(depth - 1, depth), "all": range(depth)}
    if layers in named:
        return list(named[layers])
    words = [word.strip() for word in layers.split(",")]
    if not all(word.isdecimal() and int(word) < depth for word in words):
        raise InputError(
            f"--relation-layers {layers}: give last, all, or numbers from 0 to {depth - 1}, as 0,{depth - 1}"
        )
    return sorted({int(word) for word in words})


def _is_eva(name: str) -> bool:
    """Whether timm builds this ViT as an Eva, with rotary positions."""
    return is_model_in_modules(architecture_of(name), ["eva"])


def _projection(kind: type[nn.Conv2d], projection: nn.Conv2d) -> nn.Conv2d:
    """The same patch projection, with the same parameters, as another class."""
    size = int(projection.kernel_size[0])
    converted = kind(
        projection.in_channels, projection.out_channels, size, size, bias=projection.bias is not None, device="meta"
    )
    converted.weight, converted.bias = projection.weight, projection.bias
    return converted

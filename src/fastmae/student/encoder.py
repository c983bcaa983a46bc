"""The plain ViT as an encoder: timm's, which embeds and encodes only the visible patches (Sec. 3.2.4).

Shapes: B views, N patches per view, V visible ones, R prefix tokens (class token and registers), D the width, K the
image channels, P the side of a patch.
"""

from dataclasses import dataclass, field
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
from fastmae.outside.networks import create_network
from fastmae.runtime.fast_linear import linear
from fastmae.student.lookup import linear_plus_rows

MOST_WEIGHTS = 20_000_000_000
"""Of a student; as float32 with AdamW's state, 320 GB."""
NARROWEST = 64
"""Width of timm's narrowest ViT."""
Encoder = Any
"""A network of timm. Its attributes depend on its class, and nn.Module types them all as Tensor or Module."""


@dataclass
class EncodedLayers:
    """What the layers of an encoder give.

    Attributes:
        tokens: [B, R + V, D] for each layer, the prefix tokens first.
        normed: [B, R + V, D] for each layer that has a head, and whose head reads its tokens normalised, without scale
            and shift.
    """

    tokens: list[torch.Tensor]
    normed: list[torch.Tensor] = field(default_factory=list)


def cut_patches(images: torch.Tensor, patch_size: int, ids_keep: torch.Tensor) -> torch.Tensor:
    """Cut the patches in `ids_keep` out of images, before anything else is computed from them.

    Args:
        images: [B, K, H, W] of any dtype and memory layout.
        patch_size: P.
        ids_keep: int64 [B, V].

    Returns:
        [B, V, K, P, P], of the images' dtype.
    """
    cols = images.shape[3] // patch_size
    grid = images.unflatten(3, (cols, patch_size)).unflatten(2, (-1, patch_size)).permute(0, 2, 4, 1, 3, 5)
    batch = torch.arange(len(images), device=images.device)[:, None]
    return grid[batch, ids_keep // cols, ids_keep % cols]


def embed_visible(encoder: Encoder, patches: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
    """What timm's ViTs do before their first block, for the visible patches only.

    With 75 % of the patches masked, this saves three quarters of the projection: 1 % of the FLOPs of a ViT-B's step.

    Args:
        encoder: from `build_encoder`.
        patches: float [B, V, K, P, P], from `cut_patches`, normalised.
        ids_keep: int64 [B, V].

    Returns:
        [B, R + V, D], the prefix tokens first.
    """
    prefix = [token for token in (encoder.cls_token, encoder.reg_token) if token is not None]
    prefix_tokens, position = torch.cat(prefix, dim=1) if prefix else None, None
    if encoder.pos_embed is not None:
        of_prefix = encoder.pos_embed.shape[1] - encoder.patch_embed.num_patches
        prefix_position, position = encoder.pos_embed[0].tensor_split([of_prefix])
        prefix_tokens = prefix_tokens + prefix_position if of_prefix else prefix_tokens
    tokens = _embed_patches(encoder.patch_embed, patches, position, ids_keep)
    if prefix_tokens is not None:
        tokens = torch.cat([prefix_tokens.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
    return encoder.norm_pre(encoder.pos_drop(tokens))


def _embed_patches(
    patch_embed: Any, patches: torch.Tensor, position: torch.Tensor | None, ids_keep: torch.Tensor
) -> torch.Tensor:
    """Project patches [B, V, K, P, P], and add their rows of the positions [N, D], if there are any: [B, V, D]."""
    operands = patches.flatten(2), patch_embed.proj.weight.flatten(1), patch_embed.proj.bias
    if position is not None and isinstance(patch_embed.norm, nn.Identity):
        return linear_plus_rows(*operands, position, ids_keep)
    tokens: torch.Tensor = patch_embed.norm(linear(*operands))
    return tokens if position is None else tokens + F.embedding(ids_keep, position.to(tokens.dtype))


def rotary_positions(encoder: Encoder) -> torch.Tensor | None:
    """The rotary positions of all patches, [N, E], or [depth, heads, N, E] where they are learnt; None without any."""
    if getattr(encoder, "rope", None) is None:
        return None
    positions: torch.Tensor = encoder.rope.get_embed(list(encoder.patch_embed.grid_size))
    return positions


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
        InputError: no such ViT, sizes that don't divide, or sizes that no memory holds.
    """
    architecture = architecture_of(name)
    if not (architecture.startswith("vit_") and timm.is_model(architecture)):
        raise InputError(
            f"--encoder {name}: not one of timm's vit_* names (vit_tiny_patch16_224, vit_base_patch16_224, ...)"
        )
    check_grid(image_size, patch_size)
    check_weights("--encoder-width, --encoder-depth", weights_of_blocks(width or 0, depth or 1))
    check_weights("--image-size, --encoder-width", (image_size // patch_size) ** 2 * (width or NARROWEST))
    arguments = timm_arguments(name, image_size, patch_size, width, depth, heads, channels)
    try:
        encoder: Encoder = create_network(architecture, {**arguments, **extra})
    except InputError:
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        cause = " ".join(str(error).split())
        raise InputError(f"--encoder {name}: timm can't build it with these sizes ({cause})") from error
    side = image_size // patch_size
    if type(encoder) not in (VisionTransformer, Eva) or tuple(encoder.patch_embed.grid_size) != (side, side):
        raise InputError(
            f"--encoder {name}: its positions or its convolutional stem rule out masking before the encoder; "
            f"use a plain ViT"
        )
    # MAE's initialisation, which treats the patch projection as a linear layer.
    encoder.apply(initialise_linear)
    nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.flatten(1))
    # Fixed positions for the patches, zero for the prefix tokens. Rotary ViTs may have no position embedding.
    if encoder.pos_embed is not None:
        prefix = encoder.pos_embed.shape[1] - encoder.patch_embed.num_patches
        positions = sincos_positions(encoder.patch_embed.grid_size, encoder.embed_dim)
        encoder.pos_embed = nn.Parameter(F.pad(positions, (0, 0, prefix, 0))[None], requires_grad=False)
    return encoder


def weights_of_blocks(width: int, depth: int) -> int:
    """Weights of transformer blocks: four matrices of attention, and an MLP of four times the width."""
    return 12 * width**2 * depth


def check_weights(options: str, weights: int) -> None:
    """Refuse a network of more than `MOST_WEIGHTS` by arithmetic: even without its memory, building it takes minutes.

    Args:
        options: that set the size.
        weights: that it has at least.

    Raises:
        InputError: names the options.
    """
    if weights > MOST_WEIGHTS:
        raise InputError(
            f"{options}: a student of {weights / 1e9:.3g} billion weights and more; "
            f"give smaller ones, for {MOST_WEIGHTS / 1e9:.3g} billion at most"
        )


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


def number_of_heads(encoder: Encoder) -> int:
    """Attention heads of a ViT's blocks. Blocks that do several things side by side hold them in another place."""
    return next(int(module.num_heads) for module in encoder.blocks[0].modules() if hasattr(module, "num_heads"))


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
    if not all(word.isdecimal() and len(word) < 6 and int(word) < depth for word in words):
        raise InputError(
            f"--relation-layers {layers}: give last, all, or numbers from 0 to {depth - 1}, as 0,{depth - 1}"
        )
    return sorted({int(word) for word in words})


def _is_eva(name: str) -> bool:
    """Whether timm builds this ViT as an Eva, with rotary positions."""
    return is_model_in_modules(architecture_of(name), ["eva"])

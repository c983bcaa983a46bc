"""The student: f of Eq. 1. Mask before the encoder, encode what is visible, decode with one block, compare with the target.

The encoder is timm's ViT as it is, so its weights leave as they are; what is added around it here is thrown away after
pre-training. Nothing here knows files, stores or teachers.

Shapes: B views, N patches a view, V of them visible, D the encoder's width, W the decoder's, C the target's channels, K the images'.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
from torch.utils.checkpoint import checkpoint

from fastmae.decoder import DecoderBlock
from fastmae.errors import InputError
from fastmae.linear import linear

Encoder = Any
"""A timm ViT: its attributes differ between its kinds, and nn.Module types them as Tensor or Module."""
LayerNorm: Any = partial(nn.LayerNorm, eps=1e-6)


def cosine_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - cosine of each patch's prediction and target [..., C], averaged."""
    return (1 - F.cosine_similarity(prediction, target, dim=-1)).mean()


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "smooth-l1": F.smooth_l1_loss,
    "mse": F.mse_loss,
    "cosine": cosine_loss,
}


@dataclass
class Prediction:
    """What a student's forward gives.

    Attributes:
        decoded: [B, M, C], by the decoder, for the last M places of `order`: the masked ones, or all.
        layers: [B, V, C] by each encoder layer's head, for the places `order[:, :V]`; empty without all layers matter.
    """

    decoded: torch.Tensor
    layers: list[torch.Tensor]


@dataclass(frozen=True)
class StudentLoss:
    """The decoder's loss on the masked patches plus the mean of the layers' on the visible ones (Sec. 4.2.1).

    Outside the student's forward, so that under mixed precision the target is compared as it is, in fp32.

    Attributes:
        kind: a key of `LOSSES`.
        layers_weight: of the layers' mean.
        dims: channels of each teacher's part of the target; each has a loss of its own.
        weights: of those losses.
    """

    kind: str
    layers_weight: float
    dims: tuple[int, ...]
    weights: tuple[float, ...]

    def __call__(self, prediction: Prediction, target: torch.Tensor, order: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scalars `loss`, `decoder_loss`, `layers_loss`.

        Args:
            prediction: of a student.
            target: float32 [B, N, C], normalised guidance of all patches.
            order: int64 [B, N], as the student had it.
        """
        first = order.shape[1] - prediction.decoded.shape[1]
        decoder_loss = self._compare(prediction.decoded, _gather(target, order[:, first:]))
        layers_loss = decoder_loss.new_zeros(())
        if prediction.layers:
            seen = _gather(target, order[:, : prediction.layers[0].shape[1]])
            layers_loss = torch.stack([self._compare(layer, seen) for layer in prediction.layers]).mean()
        loss = decoder_loss + self.layers_weight * layers_loss
        return {"loss": loss, "decoder_loss": decoder_loss, "layers_loss": layers_loss}

    def _compare(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        parts = zip(self.weights, prediction.float().split(self.dims, -1), target.split(self.dims, -1), strict=True)
        return torch.stack([weight * LOSSES[self.kind](mine, wanted) for weight, mine, wanted in parts]).sum()


class ProjectVisible(nn.Conv2d):
    """timm's patch projection, a convolution of stride and kernel P, that computes only the patches whose places are set.

    The other places are left zero: `KeepVisible` drops them right after the positions were added. At 75 % masked this saves
    three quarters of the projection: 1 % of the FLOPs of a ViT-B's step. Its parameters, their names and shapes are the convolution's.
    """

    places: torch.Tensor | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, K, H, W] -> [B, D, H / P, W / P]; all of it when no places are set."""
        if self.places is None:
            return super().forward(images)
        patch = self.kernel_size[0]
        batch, _, height, width = images.shape
        visible = _gather(F.unfold(images, patch, stride=patch).transpose(1, 2), self.places)
        projected = linear(visible, self.weight.flatten(1), self.bias)
        places = self.places.unsqueeze(-1).expand_as(projected)
        whole = projected.new_zeros(batch, height // patch * (width // patch), self.out_channels).scatter(1, places, projected)
        return whole.transpose(1, 2).unflatten(2, (height // patch, width // patch))


class KeepVisible(nn.Module):
    """Sits in the `patch_drop` slot of timm's ViTs and keeps the patches whose places `Student.encode` set.

    Args:
        prefix_tokens: class and register tokens, always kept.
        tell_places: give the places too, as timm's Eva wants them, to turn its rotary positions likewise.
    """

    def __init__(self, prefix_tokens: int, tell_places: bool):
        super().__init__()
        self.prefix_tokens, self.tell_places = prefix_tokens, tell_places
        self.places: torch.Tensor | None = None

    def forward(self, tokens: torch.Tensor) -> Any:
        """[B, prefix + N, D] -> [B, prefix + V, D]; all of them when no places are set."""
        if self.places is not None:
            prefix, patches = tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]
            tokens = torch.cat([prefix, _gather(patches, self.places)], dim=1)
        return (tokens, self.places) if self.tell_places else tokens


class Student(nn.Module):
    """Masked autoencoder over a timm ViT.

    Args:
        encoder: from `build_encoder`.
        target_dim: C, channels of what is predicted.
        mask_ratio: share of the patches that is masked. (Sec. 4.1.1)
        all_layers: every encoder layer has a head of its own. (Sec. 4.2.1)
        fusion: the decoder reads the sum of all layers' projected outputs (as ConvMAE does with its stages).
        decoder_depth: blocks. (Sec. 4.3.3)
        decoder_width: W.
        decoder_heads: attention heads of a block.
        decoder_class_token: the decoder sees the encoder's class token (and registers) too, as MAE's does.
        predict_visible: the decoder predicts the visible patches too, not the masked ones alone.
        checkpoint_activations: compute the blocks' activations again in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        encoder: Encoder,
        target_dim: int,
        mask_ratio: float = 0.75,
        all_layers: bool = True,
        fusion: bool = False,
        decoder_depth: int = 1,
        decoder_width: int = 512,
        decoder_heads: int = 16,
        decoder_class_token: bool = False,
        predict_visible: bool = False,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        self.encoder: Encoder = encoder
        grid = encoder.patch_embed.grid_size
        width, depth = int(encoder.embed_dim), len(encoder.blocks)
        self.patches = int(grid[0] * grid[1])
        self.visible = visible_patches(self.patches, mask_ratio)
        self.decoder_prefix = int(encoder.num_prefix_tokens) if decoder_class_token else 0
        self.first_predicted = self.decoder_prefix + (0 if predict_visible else self.visible)
        self.checkpoint_activations = checkpoint_activations
        encoder.set_grad_checkpointing(checkpoint_activations)

        self.layer_heads = nn.ModuleList(
            nn.Sequential(LayerNorm(width), nn.Linear(width, target_dim)) for _ in range(depth if all_layers else 0)
        )
        self.fusion_projections = nn.ModuleList(nn.Linear(width, width) for _ in range(depth if fusion else 0))
        self.fusion_norm = LayerNorm(width) if fusion else nn.Identity()

        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_position = nn.Parameter(sincos_positions(grid, decoder_width), requires_grad=False)
        self.decoder_blocks = nn.Sequential(
            *(DecoderBlock(decoder_width, decoder_heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(decoder_depth))
        )
        self.decoder_norm = LayerNorm(decoder_width)
        self.decoder_head = nn.Linear(decoder_width, target_dim)
        self._initialise()

    def forward(self, images: torch.Tensor, order: torch.Tensor) -> Prediction:
        """Predict the target from the visible patches: that of the masked ones, and of their own by every layer.

        Args:
            images: float [B, K, H, W], normalised.
            order: int64 [B, N]: the first V places are visible, the rest masked.
        """
        prefix, layers = self.encode_with_prefix(images, order[:, : self.visible])
        by_layer = [head(layer) for head, layer in zip(self.layer_heads, layers, strict=True)] if self.layer_heads else []
        return Prediction(self.decode(layers, order, prefix if self.decoder_prefix else None), by_layer)

    def encode(self, images: torch.Tensor, visible: torch.Tensor) -> list[torch.Tensor]:
        """The patch tokens after each encoder block, the last one after the final norm too.

        Args:
            images: [B, K, H, W].
            visible: int64 [B, V], places of the patches that the encoder sees.

        Returns:
            One [B, V, D] a block.
        """
        return self.encode_with_prefix(images, visible)[1]

    def encode_with_prefix(self, images: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Class and register tokens at the end, [B, R, D], and what `encode` gives."""
        masking = (self.encoder.patch_embed.proj, self.encoder.patch_drop)
        for module in masking:
            module.places = visible
        try:
            final, layers = self.encoder.forward_intermediates(images, output_fmt="NLC")
        finally:
            for module in masking:
                module.places = None
        prefix, patches = final.tensor_split([self.encoder.num_prefix_tokens], dim=1)
        return prefix, [*layers[:-1], patches]

    def decode(self, layers: list[torch.Tensor], order: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
        """Predict the masked patches.

        Args:
            layers: as `encode` gives them.
            order: int64 [B, N].
            prefix: [B, R, D], the encoder's class token and registers, for a decoder that sees them; they have no position.

        Returns:
            [B, M, C], for the last M places of `order`.
        """
        read = layers[-1]
        if self.fusion_projections:
            read = self.fusion_norm(
                torch.stack([project(layer) for project, layer in zip(self.fusion_projections, layers, strict=True)]).sum(0)
            )
        # Attention knows no order, so the patches stay shuffled: visible ones first, positions shuffled along.
        visible, hidden = order.split([self.visible, self.patches - self.visible], dim=1)
        tokens = self.decoder_embed(read) + self.decoder_position[visible]
        if prefix is not None:
            tokens = torch.cat([self.decoder_embed(prefix).to(tokens.dtype), tokens], dim=1)
        masked = (self.mask_token[0] + self.decoder_position, hidden)
        first, *others = self.decoder_blocks
        tokens = self._run(first, tokens, 0 if others else self.first_predicted, masked)
        for block in others:
            tokens = self._run(block, tokens, self.first_predicted if block is others[-1] else 0)
        return self.decoder_head(self.decoder_norm(tokens))

    def _run(self, block: nn.Module, *given: Any) -> torch.Tensor:
        return checkpoint(block, *given, use_reentrant=False) if self.checkpoint_activations and self.training else block(*given)

    def _initialise(self) -> None:
        """MAE's: Xavier-uniform linear layers, zero biases, mask token of deviation 0.02 (the encoder came so already)."""
        for module in (
            self.layer_heads,
            self.fusion_projections,
            self.decoder_embed,
            self.decoder_blocks,
            self.decoder_head,
        ):
            module.apply(_initialise_linear)
        nn.init.normal_(self.mask_token, std=0.02)


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
        raise InputError(f"--encoder {name}: not one of timm's vit_* names (vit_tiny_patch16_224, vit_base_patch16_224, ...)")
    if image_size % patch_size:
        fitting = max(patch_size, image_size // patch_size * patch_size)
        raise InputError(f"--image-size {image_size}: not a multiple of the store's patch size {patch_size}; take {fitting}")
    rotary = is_model_in_modules(name, ["eva"])
    arguments = timm_arguments(name, image_size, patch_size, width, depth, heads, channels)
    try:
        encoder: Encoder = timm.create_model(name, pretrained=False, **arguments, **extra)
    except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"--encoder {name}: timm can't build it with these sizes ({' '.join(str(error).split())})") from error
    side = image_size // patch_size
    if type(encoder) not in (VisionTransformer, Eva) or tuple(encoder.patch_embed.grid_size) != (side, side):
        raise InputError(
            f"--encoder {name}: its positions or its convolutional stem don't allow masking before the encoder; take a plain ViT"
        )
    encoder.patch_embed.proj = _projection(ProjectVisible, encoder.patch_embed.proj)
    encoder.patch_drop = KeepVisible(encoder.num_prefix_tokens, tell_places=rotary)
    encoder.apply(_initialise_linear)
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
    head: dict[str, Any] = {"global_pool": "avg", "use_fc_norm" if is_model_in_modules(name, ["eva"]) else "fc_norm": False}
    changed = {key: value for key, value in {"embed_dim": width, "depth": depth, "num_heads": heads}.items() if value is not None}
    return {"num_classes": 0, "img_size": image_size, "patch_size": patch_size, "in_chans": channels, **head, **changed}


def without_masking(encoder: Encoder) -> Encoder:
    """The encoder as timm makes it, for use after pre-training."""
    encoder.patch_embed.proj = _projection(nn.Conv2d, encoder.patch_embed.proj)
    encoder.patch_drop = None if encoder.patch_drop.tell_places else nn.Identity()
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
        raise InputError(f"--mask-ratio {mask_ratio}: of {patches} patches {visible} would be visible; give more than 0 and less than 1")
    return visible


def _gather(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """tokens [B, N, K] at places [B, V] -> [B, V, K]."""
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _projection(kind: type[nn.Conv2d], projection: nn.Conv2d) -> nn.Conv2d:
    """The same patch projection as another class: it takes over the parameters themselves."""
    size = int(projection.kernel_size[0])
    own = kind(projection.in_channels, projection.out_channels, size, size, bias=projection.bias is not None, device="meta")
    own.weight, own.bias = projection.weight, projection.bias
    return own


def _initialise_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

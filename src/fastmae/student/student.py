"""The student: f of Eq. 1. Mask before the encoder, encode what is visible, decode with one block, compare with the target.

The encoder is timm's ViT as it is, so its weights leave as they are; what is added around it here is thrown away after
pre-training. Nothing here knows files, stores or teachers.

Shapes: B views, N patches a view, V of them visible, D the encoder's width, W the decoder's, C the target's channels, K the images'.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastmae.config import PretrainConfig
from fastmae.runtime.fast_linear import with_fast_linear
from fastmae.student.decoder import DecoderBlock
from fastmae.student.encoder import (
    Encoder,
    LayerNorm,
    build_encoder,
    initialise_linear,
    sincos_positions,
    visible_patches,
)
from fastmae.student.loss import Prediction


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
            *(
                DecoderBlock(decoder_width, decoder_heads, qkv_bias=True, norm_layer=LayerNorm)
                for _ in range(decoder_depth)
            )
        )
        self.decoder_norm = LayerNorm(decoder_width)
        self.decoder_head = nn.Linear(decoder_width, target_dim)
        self._initialise()

    def forward(self, images: torch.Tensor, ids_shuffle: torch.Tensor) -> Prediction:
        """Predict the target from the visible patches: that of the masked ones, and of their own by every layer.

        Args:
            images: float [B, K, H, W], normalised.
            ids_shuffle: int64 [B, N]: the first V places are visible, the rest masked.
        """
        prefix, layers = self.encode_with_prefix(images, ids_shuffle[:, : self.visible])
        by_layer = (
            [head(layer) for head, layer in zip(self.layer_heads, layers, strict=True)] if self.layer_heads else []
        )
        return Prediction(self.decode(layers, ids_shuffle, prefix if self.decoder_prefix else None), by_layer)

    def encode(self, images: torch.Tensor, visible: torch.Tensor) -> list[torch.Tensor]:
        """The patch tokens after each encoder block, the last one after the final norm too.

        Args:
            images: [B, K, H, W].
            visible: int64 [B, V], places of the patches that the encoder sees.

        Returns:
            One [B, V, D] a block.
        """
        return self.encode_with_prefix(images, visible)[1]

    def encode_with_prefix(
        self, images: torch.Tensor, visible: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Class and register tokens at the end, [B, R, D], and what `encode` gives."""
        masking = (self.encoder.patch_embed.proj, self.encoder.patch_drop)
        for module in masking:
            module.ids_keep = visible
        try:
            final, layers = self.encoder.forward_intermediates(images, output_fmt="NLC")
        finally:
            for module in masking:
                module.ids_keep = None
        prefix, patches = final.tensor_split([self.encoder.num_prefix_tokens], dim=1)
        return prefix, [*layers[:-1], patches]

    def decode(
        self, layers: list[torch.Tensor], ids_shuffle: torch.Tensor, prefix: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict the masked patches.

        Args:
            layers: as `encode` gives them.
            ids_shuffle: int64 [B, N].
            prefix: [B, R, D], the encoder's class token and registers, for a decoder that sees them; they have no position.

        Returns:
            [B, M, C], for the last M places of `ids_shuffle`.
        """
        read = layers[-1]
        if self.fusion_projections:
            read = self.fusion_norm(
                torch.stack(
                    [project(layer) for project, layer in zip(self.fusion_projections, layers, strict=True)]
                ).sum(0)
            )
        # Attention knows no ids_shuffle, so the patches stay shuffled: visible ones first, positions shuffled along.
        visible, hidden = ids_shuffle.split([self.visible, self.patches - self.visible], dim=1)
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
        return (
            checkpoint(block, *given, use_reentrant=False)
            if self.checkpoint_activations and self.training
            else block(*given)
        )

    def _initialise(self) -> None:
        """MAE's: Xavier-uniform linear layers, zero biases, mask token of deviation 0.02 (the encoder came so already)."""
        for module in (
            self.layer_heads,
            self.fusion_projections,
            self.decoder_embed,
            self.decoder_blocks,
            self.decoder_head,
        ):
            module.apply(initialise_linear)
        nn.init.normal_(self.mask_token, std=0.02)


def build_student(config: PretrainConfig, patch_size: int, target_dim: int, channels: int, on: str = "cpu") -> Student:
    """The student at random, on a device ('meta' checks the sizes without allocating)."""
    with torch.device(on):
        encoder = build_encoder(
            config.encoder,
            config.image_size,
            patch_size,
            config.encoder_width,
            config.encoder_depth,
            config.encoder_heads,
            channels,
        )
        student = Student(
            encoder,
            target_dim,
            mask_ratio=config.mask_ratio,
            all_layers=config.all_layers,
            fusion=config.fusion,
            decoder_depth=config.decoder_depth,
            decoder_width=config.decoder_width,
            decoder_heads=config.decoder_heads,
            decoder_class_token=config.decoder_class_token,
            predict_visible=config.loss_on == "all",
            checkpoint_activations=config.checkpoint_activations,
        )
    return with_fast_linear(student)

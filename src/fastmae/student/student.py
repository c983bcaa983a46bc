"""The student, f of Eq. 1: mask the image, encode the visible patches, decode, and predict the target.

The encoder is timm's ViT, so its weights can be used elsewhere as they are. The decoder and the heads around it are
thrown away after pre-training. Without a decoder, the student learns from the visible patches alone, and the mask only
saves time; without a mask either, this is plain distillation out of the store. This module knows no files, stores or
teachers.

Shapes: B views, N patches per view, V visible ones, M predicted ones, D the encoder's width, W the decoder's, C target
channels, K image channels, R prefix tokens (class token and registers).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_keep_indices_nlc
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastmae.config import PretrainConfig
from fastmae.errors import InputError
from fastmae.images.views import PixelScale
from fastmae.runtime.fast_linear import linear_each, with_fast_linear
from fastmae.runtime.low_precision import (
    LayerNorm,
    autocast_dtype,
    call_cast,
    fold_norm,
    layer_norm,
    with_fast_norms,
)
from fastmae.student.attention import PackedBlock, with_packed_attention
from fastmae.student.decoder import DecoderBlock
from fastmae.student.encoder import (
    EncodedLayers,
    Encoder,
    build_encoder,
    check_grid,
    check_weights,
    cut_patches,
    embed_visible,
    initialise_linear,
    layer_numbers,
    names_plain_vit,
    rotary_positions,
    sincos_positions,
    visible_patches,
    weights_of_blocks,
)
from fastmae.student.feature_map import build_network
from fastmae.student.lookup import linear_plus_rows
from fastmae.student.loss import Prediction
from fastmae.student.map_student import MapStudent

HEAD_EPS = 1e-6
"""Added to the variance by the norms of the layers' heads: timm's value for the blocks of its ViTs."""


class Student(nn.Module):
    """Masked autoencoder around a timm ViT.

    Args:
        encoder: from `build_encoder`.
        target_dim: C.
        mask_ratio: fraction of the patches that is masked. (Sec. 4.1.1)
        all_layers: every encoder layer has a head that predicts the target of the visible patches. (Sec. 4.2.1)
            False: no layer has one; without a decoder, the last one has.
        fusion: the decoder reads the sum of all layers' projected outputs, as ConvMAE fuses its stages.
        decoder_depth: number of blocks (Sec. 4.3.3); 0: no decoder.
        decoder_width: W.
        decoder_heads: attention heads of a block.
        decoder_class_token: the decoder also sees the prefix tokens, as in MAE.
        predict_visible: the decoder predicts the visible patches too.
        relation_layers: numbers of the encoder layers whose relations are compared, from 0.
        checkpoint_activations: recompute the blocks' activations in the backward pass instead of keeping them.
    """

    rotary: torch.Tensor | None

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
        relation_layers: Sequence[int] = (),
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        self.encoder: Encoder = encoder
        grid = encoder.patch_embed.grid_size
        self.image_size = int(encoder.patch_embed.img_size[0])
        self.patch_size = int(encoder.patch_embed.patch_size[0])
        width, depth = int(encoder.embed_dim), len(encoder.blocks)
        self.patches = int(grid[0] * grid[1])
        self.visible = visible_patches(self.patches, mask_ratio)
        self.decoder_prefix = int(encoder.num_prefix_tokens) if decoder_class_token else 0
        self.first_predicted = self.decoder_prefix + (0 if predict_visible else self.visible)
        self.checkpoint_activations = checkpoint_activations

        # Rotary positions are constants, unless they are learnt.
        learnt = getattr(encoder, "rope_mixed", False)
        self.register_buffer("rotary", None if learnt else rotary_positions(encoder), persistent=False)
        self.layers_with_head = range(depth) if all_layers else range(depth - 1, depth) if not decoder_depth else ()
        self.layer_heads = nn.ModuleList(
            nn.Sequential(LayerNorm(width, HEAD_EPS), nn.Linear(width, target_dim)) for _ in self.layers_with_head
        )
        self.relation_layers = relation_layers
        self.fusion_projections = nn.ModuleList(nn.Linear(width, width) for _ in range(depth if fusion else 0))
        self.fusion_norm = LayerNorm(width) if fusion else nn.Identity()

        self.has_decoder = decoder_depth > 0
        if self.has_decoder:
            self.decoder_embed = nn.Linear(width, decoder_width)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
            self.decoder_position = nn.Parameter(sincos_positions(grid, decoder_width), requires_grad=False)
            blocks = [
                DecoderBlock(decoder_width, decoder_heads, qkv_bias=True, norm_layer=LayerNorm)
                for _ in range(decoder_depth)
            ]
            self.decoder_blocks = nn.Sequential(*blocks)
            self.decoder_norm = LayerNorm(decoder_width)
            self.decoder_head = nn.Linear(decoder_width, target_dim)
        self._initialise()

    def forward(
        self, images: torch.Tensor, ids_shuffle: torch.Tensor, pixel_scale: PixelScale | None = None
    ) -> Prediction:
        """Predict the target: the decoder, of the masked patches; the layers' heads, of the visible ones.

        Args:
            images: float [B, K, H, W], normalised; or uint8, with `pixel_scale`.
            ids_shuffle: int64 [B, N], a permutation of the patches: the first V are visible, the others masked.
            pixel_scale: normalises the visible patches.
        """
        return self.predict(self.encode_tokens(images, ids_shuffle[:, : self.visible], pixel_scale), ids_shuffle)

    def predict(self, layers: EncodedLayers, ids_shuffle: torch.Tensor) -> Prediction:
        """What `forward` returns, from the encoder's output.

        Args:
            layers: as `encode_tokens` returns them.
            ids_shuffle: int64 [B, N].
        """
        return Prediction(
            decoded=self.decode(layers.tokens, ids_shuffle) if self.has_decoder else None,
            heads=self._apply_heads(layers.normed) if layers.normed else None,
            prefix=int(self.encoder.num_prefix_tokens),
            features=[self._patches(layers.tokens[number]) for number in self.relation_layers],
        )

    def encode(self, images: torch.Tensor, ids_keep: torch.Tensor) -> list[torch.Tensor]:
        """The visible patches' tokens after each encoder block; after the last block, they have passed the final norm.

        Args:
            images: float [B, K, H, W], normalised.
            ids_keep: int64 [B, V], the visible patches.

        Returns:
            [B, V, D] for each block.
        """
        return [self._patches(layer) for layer in self.encode_tokens(images, ids_keep).tokens]

    def encode_tokens(
        self, images: torch.Tensor, ids_keep: torch.Tensor, pixel_scale: PixelScale | None = None
    ) -> EncodedLayers:
        """As `encode`, with the prefix tokens in front, and with what the heads read. `images` as `forward`'s."""
        patches = cut_patches(images, self.patch_size, ids_keep)
        if pixel_scale is not None:
            patches = pixel_scale(patches)
        tokens = embed_visible(self.encoder, patches, ids_keep)
        rotary = self._visible_rotary_positions(tokens, ids_keep)
        layers = EncodedLayers([])
        for number, block in enumerate(self.encoder.blocks):
            headed = number - 1 in self.layers_with_head  # the layer before, whose output is this one's input
            if headed and isinstance(block, PackedBlock) and block.norm1.eps == HEAD_EPS:
                tokens, normed = self._run_block(block, tokens, with_normed=True)
                layers.normed.append(normed)
            else:
                if headed:
                    layers.normed.append(layer_norm(tokens, HEAD_EPS))
                rope = {} if rotary is None else {"rope": rotary[number] if self.encoder.rope_mixed else rotary}
                tokens = self._run_block(block, tokens, **rope)
            layers.tokens.append(tokens)
        layers.tokens[-1] = self.encoder.norm(tokens)
        if number in self.layers_with_head:
            layers.normed.append(layer_norm(layers.tokens[-1], HEAD_EPS))
        return layers

    def _visible_rotary_positions(self, tokens: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor | None:
        """As the blocks take them: [B, 1, V, E] for all of them, or learnt ones, [B, heads, V, E], for each."""
        if self.rotary is not None:
            return apply_keep_indices_nlc(tokens, self.rotary, ids_keep).unsqueeze(1)
        learnt = rotary_positions(self.encoder)
        return None if learnt is None else apply_keep_indices_nlc(tokens, learnt, ids_keep).transpose(0, 1)

    def _patches(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, R + V, D] -> [B, V, D]."""
        return tokens[:, self.encoder.num_prefix_tokens :]

    def _apply_heads(self, normed: list[torch.Tensor]) -> torch.Tensor:
        """The predictions of the layers' heads, [L, B, R + V, C], from their normalised tokens, [B, R + V, D] each.

        The scale and shift of each head's norm go into its linear layer, in fp32. The prefix tokens are not left out:
        cutting them out of each layer would take longer.
        """
        heads: Any = self.layer_heads
        norms, linears = [head[0] for head in heads], [head[1] for head in heads]
        scales, shifts = (torch.stack([getattr(norm, name) for norm in norms]) for name in ("weight", "bias"))
        weights, biases = (torch.stack([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
        weights, biases = fold_norm(scales, shifts, weights, biases)
        dtype = autocast_dtype(weights)
        return linear_each([tokens.to(dtype) for tokens in normed], weights.to(dtype), biases.to(dtype))

    def decode(self, layers: list[torch.Tensor], ids_shuffle: torch.Tensor) -> torch.Tensor:
        """Predict the masked patches, or all of them with `predict_visible`.

        Args:
            layers: [B, R + V, D] for each encoder layer, as `encode_tokens` returns them.
            ids_shuffle: int64 [B, N].

        Returns:
            [B, M, C], for the last M patches of `ids_shuffle`.
        """
        # The encoder's output, or the sum of all layers: [B, R + V, D].
        latent, prefix = layers[-1], int(self.encoder.num_prefix_tokens)
        if self.fusion_projections:
            by_layer = zip(self.fusion_projections, layers, strict=True)
            latent = self.fusion_norm(torch.stack([project(layer) for project, layer in by_layer]).sum(0))
            if self.decoder_prefix:  # only patches are fused
                latent = torch.cat([layers[-1][:, :prefix], latent[:, prefix:]], dim=1)
        # Attention ignores the order of tokens, so the patches stay shuffled, each with its own position. The prefix
        # tokens have none: they look up a row of zeros in front of the table. [B, R + V, W]
        ids_keep, ids_mask = ids_shuffle.split([self.visible, self.patches - self.visible], dim=1)
        positions, embed = F.pad(self.decoder_position, (0, 0, 1, 0)), self.decoder_embed
        tokens = linear_plus_rows(latent, embed.weight, embed.bias, positions, F.pad(ids_keep + 1, (prefix, 0)))
        # The first block adds the masked patches; the last one computes only the predicted ones.
        masked = ((self.mask_token[0] + self.decoder_position).to(tokens.dtype), ids_mask)
        first, *others = self.decoder_blocks
        unseen = prefix - self.decoder_prefix
        tokens = self._run_block(first, tokens, 0 if others else self.first_predicted, masked, unseen)
        for block in others:
            tokens = self._run_block(block, tokens, self.first_predicted if block is others[-1] else 0)
        return self.decoder_head(self.decoder_norm(tokens))

    def _run_block(self, block: nn.Module, *inputs: Any, **options: Any) -> Any:
        if self.checkpoint_activations and self.training:
            return checkpoint(call_cast, block, *inputs, use_reentrant=False, **options)
        return call_cast(block, *inputs, **options)

    def _initialise(self) -> None:
        """MAE's: Xavier-uniform linear layers, zero biases, a mask token with std 0.02. The encoder has its weights."""
        self.layer_heads.apply(initialise_linear)
        self.fusion_projections.apply(initialise_linear)
        if self.has_decoder:
            for module in (self.decoder_embed, self.decoder_blocks, self.decoder_head):
                module.apply(initialise_linear)
            nn.init.normal_(self.mask_token, std=0.02)


AnyStudent = Student | MapStudent


def build_student(
    config: PretrainConfig, patch_size: int, target_dim: int, channels: int, on: str = "cpu"
) -> AnyStudent:
    """The student that the options describe, with random weights.

    Args:
        config: the options.
        patch_size: side of a patch, in pixels.
        target_dim: C.
        channels: image channels.
        on: device; 'meta' checks the sizes without allocating.

    Raises:
        InputError: a size that no memory holds; as in `build_encoder` and `layer_numbers`, or in `build_network` and
            `MapStudent`; or a mask for a network that is no plain ViT.
    """
    build = _vit_student if names_plain_vit(config.encoder) else _map_student
    with torch.device(on):
        student: AnyStudent = build(config, patch_size, target_dim, channels)
    return with_packed_attention(with_fast_norms(with_fast_linear(student)))


def _vit_student(config: PretrainConfig, patch_size: int, target_dim: int, channels: int) -> Student:
    check_weights("--decoder-width, --decoder-depth", weights_of_blocks(config.decoder_width, config.decoder_depth))
    encoder = build_encoder(
        config.encoder,
        config.image_size,
        patch_size,
        config.encoder_width,
        config.encoder_depth,
        config.encoder_heads,
        channels,
    )
    relation_layers = layer_numbers(config.relation_layers, len(encoder.blocks)) if config.relation_weight else ()
    return Student(
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
        relation_layers=relation_layers,
        checkpoint_activations=config.checkpoint_activations,
    )


def _map_student(config: PretrainConfig, patch_size: int, target_dim: int, channels: int) -> MapStudent:
    if config.mask_ratio:
        raise InputError(
            f"--encoder {config.encoder}: only a plain ViT can be masked; give --mask-ratio 0, which distils into this "
            "network without a mask, or one of timm's vit_* names"
        )
    for size in ("width", "depth", "heads"):
        if getattr(config, f"encoder_{size}") is not None:
            raise InputError(f"--encoder-{size}: only a plain ViT takes it; leave it out for {config.encoder}")
    check_grid(config.image_size, patch_size)
    return MapStudent(
        config.encoder,
        build_network(config.encoder, config.image_size, channels),
        target_dim,
        config.image_size,
        channels,
        config.image_size // patch_size,
        all_layers=config.all_layers,
        relation_layers=config.relation_layers if config.relation_weight else "",
        checkpoint_activations=config.checkpoint_activations,
    )

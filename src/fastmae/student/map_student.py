"""A student that is not a plain ViT: any network of timm, without masking (`--mask-ratio 0`), and its heads.

The map of each stage is brought to the tokens' grid, and a head predicts the tokens there.

Shapes: B views, N patches per view, C target channels, K image channels, D channels of a stage, which differ.
"""

import torch
from torch import nn

from fastmae.errors import InputError
from fastmae.images.views import PixelScale
from fastmae.runtime.low_precision import LayerNorm
from fastmae.student.encoder import EncodedLayers, Encoder, gather_patches, initialise_linear, layer_numbers
from fastmae.student.feature_map import check_maps, freeze_unread, stage_maps, to_grid
from fastmae.student.loss import Prediction


class MapStudent(nn.Module):
    """A network of timm with a head on each of its stages.

    Its interface is `Student`'s. All patches are visible.

    Args:
        name: the network's name, for messages.
        encoder: from `build_network`.
        target_dim: C.
        image_size: side of a view, in pixels.
        channels: K.
        grid: patches along a view's side; N is its square.
        all_layers: every stage has a head that predicts the target; else the last one alone.
        relation_layers: stages whose features `forward` returns, as `layer_numbers` takes them; empty: none.
        checkpoint_activations: recompute activations in the backward pass instead of keeping them.

    Raises:
        InputError: a network without a map or of a fixed size, no such stage, or one that can't recompute activations.
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        target_dim: int,
        image_size: int,
        channels: int,
        grid: int,
        all_layers: bool = True,
        relation_layers: str = "",
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        self.encoder: Encoder = encoder
        self.image_size, self.grid = image_size, grid
        self.patches = self.visible = grid**2
        self.has_decoder = False
        check_maps(f"--encoder {name}", encoder, image_size, channels)
        widths: list[int] = []

        def read(images: torch.Tensor) -> list[torch.Tensor]:
            maps = stage_maps(encoder, images)
            widths.extend(feature_map.shape[1] for feature_map in maps)
            return maps if all_layers else maps[-1:]

        freeze_unread(encoder, read, image_size, channels)
        depth = len(widths)
        self.layers_with_head = range(depth) if all_layers else range(depth - 1, depth)
        self.layer_heads = nn.ModuleList(
            nn.Sequential(LayerNorm(widths[number]), nn.Linear(widths[number], target_dim))
            for number in self.layers_with_head
        )
        self.relation_layers = layer_numbers(relation_layers, depth) if relation_layers else []
        self.layer_heads.apply(initialise_linear)
        if checkpoint_activations:
            _checkpoint_activations(name, encoder)

    def forward(
        self, images: torch.Tensor, ids_shuffle: torch.Tensor, pixel_scale: PixelScale | None = None
    ) -> Prediction:
        """Predict the target of all patches.

        Args:
            images: float [B, K, H, W], normalised; or uint8, with `pixel_scale`.
            ids_shuffle: int64 [B, N], the order of the predictions.
            pixel_scale: normalises the images.
        """
        return self.predict(self.encode_tokens(images, ids_shuffle, pixel_scale), ids_shuffle)

    def encode_tokens(
        self, images: torch.Tensor, ids_keep: torch.Tensor, pixel_scale: PixelScale | None = None
    ) -> EncodedLayers:
        """The stages' features at the patches `ids_keep`, [B, N, D] each."""
        if pixel_scale is not None:
            images = pixel_scale(images)
        tokens = [to_grid(feature_map, self.grid) for feature_map in stage_maps(self.encoder, images)]
        return EncodedLayers([gather_patches(layer, ids_keep) for layer in tokens])

    def predict(self, layers: EncodedLayers, _ids_shuffle: torch.Tensor) -> Prediction:
        """What `forward` returns, from what `encode_tokens` does."""
        headed = [layers.tokens[number] for number in self.layers_with_head]
        heads = torch.stack([head(layer) for head, layer in zip(self.layer_heads, headed, strict=True)])
        return Prediction(None, heads, features=[layers.tokens[number] for number in self.relation_layers])


def _checkpoint_activations(name: str, encoder: Encoder) -> None:
    try:
        encoder.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:
        raise InputError(
            f"--checkpoint-activations: timm's {name} can't recompute its activations; leave it out"
        ) from error

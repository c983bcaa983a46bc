"""What a teacher needs from a network, whichever library it comes from, and how timm's models provide it."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from fastmae.errors import InputError


class Network(Protocol):
    """A frozen network with features on a grid.

    Attributes:
        kind: 'vit' (one token for each patch) or 'cnn' (maps that become coarser with each stage).
        depth: number of a ViT's blocks or a CNN's stages.
        patch_size: side of a ViT's patch in pixels, the stride of a hybrid's stem included; 0 for a CNN whose stages
            have strides of their own.
        native_size: side of the images in training, in pixels.
        has_final_norm: whether a norm over all patch features follows the last block.
        mean: mean of each colour by which images are normalised, for values in [0, 1].
        std: std of each colour, like `mean`.
        takes_features_as_they_are: whether its features have had all the norms that they should have.
    """

    kind: str
    depth: int
    patch_size: int
    native_size: int
    has_final_norm: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    takes_features_as_they_are: bool

    def set_image_size(self, size: int) -> None:
        """Prepare for images of another size: resample a ViT's position embeddings, lay out a Swin's windows anew."""
        ...

    def features(self, images: torch.Tensor, blocks: Sequence[int], final_norm: bool) -> list[torch.Tensor]:
        """Patch features after each of the blocks, without class and register tokens.

        Args:
            images: float32 [B, 3, S, S], normalised.
            blocks: numbers of the blocks or stages, from 0, in ascending order.
            final_norm: apply the network's final norm to each block's output.

        Returns:
            Features [B, C, h, w] of each block.
        """
        ...


class TimmNetwork(nn.Module):
    """Any timm model that gives intermediate features, as a `Network`.

    Args:
        spec: the teacher's name, for messages.
        model: timm's model, with its weights.

    Raises:
        InputError: the model gives no intermediate features.
    """

    takes_features_as_they_are = False

    def __init__(self, spec: str, model: Any):
        super().__init__()
        if not hasattr(model, "forward_intermediates"):
            raise InputError(f"{spec}: this model gives no intermediate features in timm; take another teacher")
        self.spec = spec
        self.model: Any = model
        is_vit = hasattr(model, "num_prefix_tokens") and hasattr(model, "patch_embed")
        norm = getattr(model, "norm", None)
        self.kind = "vit" if is_vit else "cnn"
        self.depth = len(model.blocks) if is_vit else len(model.feature_info)
        self.patch_size = int(model.patch_embed.feat_ratio()) if is_vit else 0
        self.native_size = int(model.pretrained_cfg["input_size"][-1])
        self.has_final_norm = is_vit and isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity)
        self.mean, self.std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]

    def set_image_size(self, size: int) -> None:
        """See `Network`.

        Raises:
            InputError: a ViT of a fixed size.
        """
        if hasattr(self.model, "set_input_size"):
            self.model.set_input_size(img_size=(size, size))
        elif self.kind == "vit":
            raise InputError(f"{self.spec}: this model can't change its image size in timm; take another teacher")

    def features(self, images: torch.Tensor, blocks: Sequence[int], final_norm: bool) -> list[torch.Tensor]:
        """See `Network`."""
        norm = {"norm": final_norm} if self.kind == "vit" else {}
        return self.model.forward_intermediates(
            images, indices=list(blocks), stop_early=True, intermediates_only=True, output_fmt="NCHW", **norm
        )

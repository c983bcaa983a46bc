"""What a teacher asks of a network, whichever library it is from."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from fastmae.errors import InputError


class Network(Protocol):
    """A frozen network with features on a grid.

    Attributes:
        kind: 'vit' (tokens, one a patch) or 'cnn' (maps, coarser by stages).
        depth: blocks of a ViT, stages of a CNN.
        patch: pixels along a ViT's patch (the stride of a hybrid's stem included); 0 for a CNN.
        native_size: side in pixels at which it was trained.
        has_final_norm: whether a norm over all patch features follows the last block.
        mean: by which its images are normalised, for each colour.
        std: the same.
    """

    kind: str
    depth: int
    patch: int
    native_size: int
    has_final_norm: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def look_at(self, size: int) -> None:
        """Get ready for images of another size (a ViT's position embeddings are resampled, a Swin's windows are laid out anew)."""
        ...

    def features(self, images: torch.Tensor, blocks: Sequence[int], final_norm: bool) -> list[torch.Tensor]:
        """Normalised images [B, 3, S, S] -> [B, C, h, w] after each of the blocks, class and register tokens dropped."""
        ...


class TimmNetwork(nn.Module):
    """Any timm model with intermediate features.

    Args:
        spec: its name, for messages.
        model: with its weights.

    Raises:
        InputError: a model that gives none.
    """

    def __init__(self, spec: str, model: Any):
        super().__init__()
        if not hasattr(model, "forward_intermediates"):
            raise InputError(f"{spec}: this model gives no intermediate features in timm; take another teacher")
        self.spec = spec
        self.model: Any = model
        is_vit = hasattr(model, "num_prefix_tokens") and hasattr(model, "patch_embed")
        self.kind = "vit" if is_vit else "cnn"
        self.depth = len(model.blocks) if is_vit else len(model.feature_info)
        self.patch = int(model.patch_embed.feat_ratio()) if is_vit else 0
        self.native_size = int(model.pretrained_cfg["input_size"][-1])
        self.has_final_norm = (
            is_vit and isinstance(getattr(model, "norm", None), nn.Module) and not isinstance(model.norm, nn.Identity)
        )
        self.mean, self.std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]

    def look_at(self, size: int) -> None:
        """As `Network`.

        Raises:
            InputError: a ViT of a fixed size.
        """
        if hasattr(self.model, "set_input_size"):
            self.model.set_input_size(img_size=(size, size))
        elif self.kind == "vit":
            raise InputError(f"{self.spec}: this model can't change its image size in timm; take another teacher")

    def features(self, images: torch.Tensor, blocks: Sequence[int], final_norm: bool) -> list[torch.Tensor]:
        """As `Network`."""
        keywords = {"norm": final_norm} if self.kind == "vit" else {}
        return self.model.forward_intermediates(
            images, indices=list(blocks), stop_early=True, intermediates_only=True, output_fmt="NCHW", **keywords
        )

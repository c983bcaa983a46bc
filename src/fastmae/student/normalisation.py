"""Guidance normalisation (Sec. 4.2.2): how a teacher's features are normalised before the student predicts them.

Shapes: B views, N patches per view, C channels.
"""

from collections.abc import Callable

import torch

Normalisation = Callable[[torch.Tensor], torch.Tensor]
"""Features [B, N, C] in any float dtype -> float32 [B, N, C]. The features are read as they are, not copied first."""

EPSILON = 1e-6
"""Added to variances. MAE's value for norm-pix; TEC publishes none for its patch norm, so it is used there too."""


def patch_norm(features: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit variance over the N patches, for each view and channel (TEC). features: [B, N, C]."""
    return _standardise(features, dim=1)


def channel_norm(features: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit variance over the C channels, for each patch (as MAE's norm-pix). features: [B, N, C]."""
    return _standardise(features, dim=2)


class StoreNorm:
    """Normalise each channel by its mean and std over the whole store, which keeps the differences between images.

    Patch norm removes just those: each view's own mean, which tells an image's category.

    Args:
        mean: [C].
        std: [C].
    """

    def __init__(self, mean: torch.Tensor, std: torch.Tensor):
        self.mean, self.scale = mean, torch.rsqrt(std.square() + EPSILON)

    def to(self, device: torch.device) -> None:
        """Move the statistics to the device of the features."""
        self.mean, self.scale = self.mean.to(device), self.scale.to(device)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """See `Normalisation`."""
        return (features - self.mean).mul_(self.scale)


def unchanged(features: torch.Tensor) -> torch.Tensor:
    """No guidance normalisation."""
    return features.float()


def _standardise(features: torch.Tensor, dim: int) -> torch.Tensor:
    # Two passes: on a CPU they take half of the time of torch.var_mean.
    centred = features - features.mean(dim, keepdim=True, dtype=torch.float32)
    variance = torch.linalg.vector_norm(centred, dim=dim, keepdim=True).square() / features.shape[dim]
    return centred.mul_(torch.rsqrt(variance + EPSILON))

"""The loss of the student: the decoder on masked patches, every encoder layer on visible ones (Sec. 4.2.1).

Shapes: B views, N patches a view, V of them visible, M predicted by the decoder, C target channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastmae.student.encoder import gather_patches


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
        decoded: [B, M, C], by the decoder, for the last M places of `ids_shuffle`: the masked ones, or all.
        layers: [B, V, C] by each encoder layer's head, for the places `ids_shuffle[:, :V]`; empty without all layers matter.
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

    def __call__(self, prediction: Prediction, target: torch.Tensor, ids_shuffle: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scalars `loss`, `decoder_loss`, `layers_loss`.

        Args:
            prediction: of a student.
            target: float32 [B, N, C], normalised guidance of all patches.
            ids_shuffle: int64 [B, N], as the student had it.
        """
        first = ids_shuffle.shape[1] - prediction.decoded.shape[1]
        decoder_loss = self._compare(prediction.decoded, gather_patches(target, ids_shuffle[:, first:]))
        layers_loss = decoder_loss.new_zeros(())
        if prediction.layers:
            seen = gather_patches(target, ids_shuffle[:, : prediction.layers[0].shape[1]])
            layers_loss = torch.stack([self._compare(layer, seen) for layer in prediction.layers]).mean()
        loss = decoder_loss + self.layers_weight * layers_loss
        return {"loss": loss, "decoder_loss": decoder_loss, "layers_loss": layers_loss}

    def _compare(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        parts = zip(self.weights, prediction.float().split(self.dims, -1), target.split(self.dims, -1), strict=True)
        return torch.stack([weight * LOSSES[self.kind](mine, wanted) for weight, mine, wanted in parts]).sum()

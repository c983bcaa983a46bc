"""The student's loss: the decoder on masked patches, every encoder layer on visible ones (Sec. 4.2.1).

Shapes: B views, N patches per view, V visible ones, M predicted by the decoder, C target channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastmae.student.encoder import gather_patches


def cosine_loss(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - cosine of prediction and target [..., C], averaged over the patches."""
    return (1 - F.cosine_similarity(pred, target, dim=-1)).mean()


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "smooth-l1": F.smooth_l1_loss,
    "mse": F.mse_loss,
    "cosine": cosine_loss,
}


@dataclass
class Prediction:
    """What the student predicts.

    Attributes:
        decoded: [B, M, C], the decoder's prediction of the last M patches of `ids_shuffle`: the masked ones, or all.
        layers: [B, V, C] for each encoder layer, its prediction of the visible patches `ids_shuffle[:, :V]`; empty
            without `all_layers`.
    """

    decoded: torch.Tensor
    layers: list[torch.Tensor]


@dataclass(frozen=True)
class StudentLoss:
    """The decoder's loss plus the weighted mean of the layers' losses (Sec. 4.2.1).

    It is computed outside of the student's forward pass, so that mixed precision leaves it in fp32.

    Attributes:
        kind: a key of `LOSSES`.
        layers_weight: weight of the layers' mean loss.
        dims: channels of each teacher's part of the target. Each part has a loss of its own.
        weights: weight of each part's loss.
    """

    kind: str
    layers_weight: float
    dims: tuple[int, ...]
    weights: tuple[float, ...]

    def __call__(
        self, prediction: Prediction, target: torch.Tensor, ids_shuffle: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Scalars `loss`, `decoder_loss` and `layers_loss`.

        Args:
            prediction: the student's.
            target: float32 [B, N, C], the normalised guidance of all patches.
            ids_shuffle: int64 [B, N], as the student got it.
        """
        # The decoder, on the last M patches in shuffled order.
        first = ids_shuffle.shape[1] - prediction.decoded.shape[1]
        decoder_loss = self._loss(prediction.decoded, gather_patches(target, ids_shuffle[:, first:]))
        # Each encoder layer, on the V visible patches.
        layers_loss = decoder_loss.new_zeros(())
        if prediction.layers:
            visible_target = gather_patches(target, ids_shuffle[:, : prediction.layers[0].shape[1]])
            layers_loss = torch.stack([self._loss(layer, visible_target) for layer in prediction.layers]).mean()
        loss = decoder_loss + self.layers_weight * layers_loss
        return {"loss": loss, "decoder_loss": decoder_loss, "layers_loss": layers_loss}

    def _loss(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the teachers' losses."""
        teachers = zip(self.weights, pred.float().split(self.dims, -1), target.split(self.dims, -1), strict=True)
        return torch.stack([weight * LOSSES[self.kind](pred, target) for weight, pred, target in teachers]).sum()

"""The student's loss: the decoder on masked patches, encoder layers on visible ones (Sec. 4.2.1), and relations.

Shapes: B views, N patches per view, V visible ones, M predicted by the decoder, C target channels, D the
encoder's width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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


def relation_loss(features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The squared difference of two cosine matrices: how the patches of a view relate to each other.

    With f_i a view's features, less their mean over its patches, and t_i its targets, likewise centred:

        mean over views and pairs (i, j) of (cos(f_i, f_j) - cos(t_i, t_j))^2

    The two may differ in width, so no head is needed between them. Not in the paper. Relations as targets: relational
    knowledge distillation (Park et al. 2019), of patches in TinyMIM (Ren et al. 2023), and as a Gram matrix of patch
    features in DINOv3's Gram anchoring (Simeoni et al. 2025).

    Args:
        features: float32 [B, V, D].
        target: float32 [B, V, C].
    """
    return F.mse_loss(_centred_cosines(features), _centred_cosines(target))


def _centred_cosines(patches: torch.Tensor) -> torch.Tensor:
    """[B, V, C] -> [B, V, V]."""
    unit = F.normalize(patches - patches.mean(1, keepdim=True), dim=-1)
    return unit @ unit.transpose(1, 2)


@dataclass
class Prediction:
    """What the student predicts.

    Attributes:
        decoded: [B, M, C], the decoder's prediction of the last M patches of `ids_shuffle`: the masked ones, or all.
            None without a decoder.
        layers: [B, V, C] for each encoder layer that has a head, its prediction of the visible patches
            `ids_shuffle[:, :V]`.
        features: [B, V, D] for each encoder layer whose relations are compared, its output at the visible patches.
    """

    decoded: torch.Tensor | None
    layers: list[torch.Tensor]
    features: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class StudentLoss:
    """The decoder's loss, plus the weighted mean of the layers' losses (Sec. 4.2.1), plus the weighted relation loss.

    It is computed outside of the student's forward pass, so that mixed precision leaves it in fp32.

    Attributes:
        kinds: a key of `LOSSES` for each teacher's part of the target.
        layers_weight: weight of the layers' mean loss.
        dims: channels of each teacher's part of the target. Each part has a loss of its own.
        weights: weight of each part's loss.
        relation_weight: weight of the relation loss, averaged over the layers that it compares.
    """

    kinds: tuple[str, ...]
    layers_weight: float
    dims: tuple[int, ...]
    weights: tuple[float, ...]
    relation_weight: float = 0.0

    def __call__(
        self, prediction: Prediction, target: torch.Tensor, ids_shuffle: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The scalar `loss`, and its terms as far as the student has them: `decoder_loss`, `layers_loss` and
        `relation_loss`.

        Args:
            prediction: the student's.
            target: float32 [B, N, C], the normalised guidance of all patches.
            ids_shuffle: int64 [B, N], as the student got it.
        """
        terms: dict[str, torch.Tensor] = {}
        weights = {"decoder_loss": 1.0, "layers_loss": self.layers_weight, "relation_loss": self.relation_weight}
        if prediction.decoded is not None:  # the last M patches in shuffled order
            first = ids_shuffle.shape[1] - prediction.decoded.shape[1]
            terms["decoder_loss"] = self._loss(prediction.decoded, gather_patches(target, ids_shuffle[:, first:]))
        at_visible = [*prediction.layers, *prediction.features]
        if at_visible:
            visible_target = gather_patches(target, ids_shuffle[:, : at_visible[0].shape[1]])
        if prediction.layers:
            terms["layers_loss"] = _mean([self._loss(layer, visible_target) for layer in prediction.layers])
        if prediction.features:
            terms["relation_loss"] = _mean([self._relation(layer, visible_target) for layer in prediction.features])
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return {"loss": loss, **terms}

    def _loss(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the teachers' losses."""
        preds, targets = pred.float().split(self.dims, -1), target.split(self.dims, -1)
        teachers = zip(self.weights, self.kinds, preds, targets, strict=True)
        return torch.stack([weight * LOSSES[kind](pred, target) for weight, kind, pred, target in teachers]).sum()

    def _relation(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the relation losses to each teacher."""
        teachers = zip(self.weights, target.split(self.dims, -1), strict=True)
        return torch.stack([weight * relation_loss(features.float(), part) for weight, part in teachers]).sum()


def _mean(losses: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(losses)).mean()

"""The student's loss: the decoder on masked patches, encoder layers on visible ones (Sec. 4.2.1), and relations.

Shapes: B views, N patches per view, V visible ones, M predicted by the decoder, L layers with a head, C target
channels, D the encoder's width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F


def _last_tokens(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The predictions that have a target: the last tokens of `pred`, as many as `target` has."""
    return pred[..., pred.shape[-2] - target.shape[-2] :, :]


def mse_loss(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean squared difference of prediction and target, in fp32."""
    return F.mse_loss(_last_tokens(pred, target).float(), target)


def cosine_loss(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - cosine of prediction and target [..., C] in fp32, averaged over the patches."""
    return (1 - F.cosine_similarity(_last_tokens(pred, target).float(), target, dim=-1)).mean()


def smooth_l1_loss(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean of x^2 / 2 where |x| < 1 and |x| - 1 / 2 elsewhere, for x = pred - target, in fp32 (Sec. 3.2.4).

    A prediction in half precision is read as it is, and so is its gradient written: torch would copy both in fp32.
    """
    if pred.dtype == target.dtype:
        return F.smooth_l1_loss(_last_tokens(pred, target), target)
    return _MixedSmoothL1.apply(pred, target)


class _MixedSmoothL1(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(pred, target)
        return F.smooth_l1_loss(_last_tokens(pred, target), target)  # computed in the wider of the two dtypes

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        pred, target = ctx.saved_tensors
        of_pred, mean = torch.empty_like(pred), 1
        first, compared = pred.shape[-2] - target.shape[-2], _last_tokens(pred, target)
        of_pred[..., :first, :] = 0
        torch.ops.aten.smooth_l1_loss_backward.grad_input(
            gradient, compared, target, mean, 1.0, grad_input=_last_tokens(of_pred, target)
        )
        return of_pred, None


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "smooth-l1": smooth_l1_loss,
    "mse": mse_loss,
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
        heads: [L, B, R + V, C], the predictions by the L encoder layers that have a head: from the R prefix tokens,
            which have no target, and of the visible patches `ids_shuffle[:, :V]`. None without heads.
        prefix: R.
        features: [B, V, D] for each encoder layer whose relations are compared, its output at the visible patches.
    """

    decoded: torch.Tensor | None
    heads: torch.Tensor | None
    prefix: int = 0
    features: list[torch.Tensor] = field(default_factory=list)

    @property
    def layers(self) -> torch.Tensor | None:
        """[L, B, V, C]: `heads` without the prefix tokens."""
        return None if self.heads is None else self.heads[:, :, self.prefix :]


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

    def __call__(self, prediction: Prediction, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """The scalar `loss`, and its terms as far as the student has them: `decoder_loss`, `layers_loss` and
        `relation_loss`.

        Args:
            prediction: the student's.
            target: float32 [B, N, C], the normalised guidance of all patches, in the order of `ids_shuffle`.
        """
        terms: dict[str, torch.Tensor] = {}
        weights = {"decoder_loss": 1.0, "layers_loss": self.layers_weight, "relation_loss": self.relation_weight}
        if prediction.decoded is not None:
            predicted = prediction.decoded.shape[1]  # the last M patches
            terms["decoder_loss"] = self._loss(prediction.decoded, target[:, target.shape[1] - predicted :])
        if prediction.heads is not None:
            visible_target = target[:, : prediction.heads.shape[2] - prediction.prefix]
            terms["layers_loss"] = self._loss(prediction.heads, visible_target.expand(len(prediction.heads), *[-1] * 3))
        if prediction.features:
            visible_target = target[:, : prediction.features[0].shape[1]]
            relations = [self._relation(layer, visible_target) for layer in prediction.features]
            terms["relation_loss"] = torch.stack(relations).mean()
        return {"loss": _weighted_sum([weights[name] for name in terms], list(terms.values())), **terms}

    def _loss(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the teachers' losses, each averaged over all patches (and layers)."""
        parts = zip(self.kinds, self._by_teacher(pred), self._by_teacher(target), strict=True)
        return _weighted_sum(self.weights, [LOSSES[kind](pred, target) for kind, pred, target in parts])

    def _relation(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the relation losses to each teacher."""
        losses = [relation_loss(features.float(), part) for part in self._by_teacher(target)]
        return _weighted_sum(self.weights, losses)

    def _by_teacher(self, channels: torch.Tensor) -> Sequence[torch.Tensor]:
        """[..., C] -> each teacher's part of the channels."""
        return [channels] if len(self.dims) == 1 else channels.split(self.dims, -1)


def _weighted_sum(weights: Sequence[float], losses: Sequence[torch.Tensor]) -> torch.Tensor:
    weighted = [loss if weight == 1 else weight * loss for weight, loss in zip(weights, losses, strict=True)]
    return weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum()

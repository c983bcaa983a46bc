"""A linear classifier on frozen features, in closed form: multinomial logistic regression through scikit-learn."""

import warnings

import torch

from fastmae.errors import InputError

STRENGTH = 1.0
"""scikit-learn's C: the inverse of the weight of the L2 penalty, on features of unit variance."""
MOST_STEPS = 300


def linear_accuracy(
    train: torch.Tensor, train_labels: torch.Tensor, val: torch.Tensor, val_labels: torch.Tensor, classes: int
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy, in percent.

    Features are standardised by the training images' mean and deviation first, as the BatchNorm without affine of MAE's probe does.

    Args:
        train: float32 [n, D].
        train_labels: int64 [n].
        val: float32 [m, D].
        val_labels: int64 [m].
        classes: how many there are; each must have a training image.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise InputError("the linear classifier comes with scikit-learn; pip install 'fastmae[demo]'") from error
    mean, std = train.mean(0), train.std(0, correction=0).clamp(min=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that it has not converged after the most steps: the probe is then a stopped one
        probe = LogisticRegression(C=STRENGTH, max_iter=MOST_STEPS).fit(
            ((train - mean) / std).numpy(), train_labels.numpy()
        )
    scores = torch.from_numpy(probe.decision_function(((val - mean) / std).numpy())).reshape(len(val), -1)
    if scores.shape[1] == 1:  # two classes have one score
        scores = torch.cat([-scores, scores], dim=1)
    ranked = scores.topk(min(5, classes), dim=1).indices == val_labels[:, None]
    return 100 * ranked[:, 0].float().mean().item(), 100 * ranked.any(1).float().mean().item()

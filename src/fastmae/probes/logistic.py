"""A linear classifier on frozen features, run to convergence: multinomial logistic regression by scikit-learn."""

import warnings

import torch

from fastmae.errors import InputError

INVERSE_PENALTY = 1.0
"""scikit-learn's C: the inverse weight of the L2 penalty, on features of unit variance."""
MAX_ITERATIONS = 300


def linear_accuracy(
    train: torch.Tensor, train_labels: torch.Tensor, val: torch.Tensor, val_labels: torch.Tensor, classes: int
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy, in percent.

    First the features are standardised by the mean and std of the training images, like in MAE's probe, whose
    BatchNorm has no parameters.

    Args:
        train: float32 [n, D].
        train_labels: int64 [n].
        val: float32 [m, D].
        val_labels: int64 [m].
        classes: number of classes; each must have a training image.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise InputError("the linear classifier needs scikit-learn; pip install 'fastmae[demo]'") from error
    mean, std = train.mean(0), train.std(0, correction=0).clamp(min=1e-6)
    probe = LogisticRegression(C=INVERSE_PENALTY, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # if it has not converged by then, that is where the probe stops
        probe.fit(((train - mean) / std).numpy(), train_labels.numpy())
    scores = torch.from_numpy(probe.decision_function(((val - mean) / std).numpy())).reshape(len(val), -1)
    if scores.shape[1] == 1:  # two classes share one score
        scores = torch.cat([-scores, scores], dim=1)
    hits = scores.topk(min(5, classes), dim=1).indices == val_labels[:, None]
    return 100 * hits[:, 0].float().mean().item(), 100 * hits.any(1).float().mean().item()

"""A linear classifier on frozen features, run to convergence: multinomial logistic regression with an L2 penalty.

On the CPU, scikit-learn fits it. On a GPU, the same objective is minimised there, by L-BFGS too.
"""

import time
import warnings

import torch
import torch.nn.functional as F

from fastmae.errors import InputError
from fastmae.runtime.progress import Progress, duration

INVERSE_PENALTY = 1.0
"""scikit-learn's C: the inverse weight of the L2 penalty, on features of unit variance."""
MAX_ITERATIONS = 300
TOLERANCE = 1e-4
"""Largest entry of the gradient at which the fit has converged, as in scikit-learn."""
LABEL = "logistic regression"
MANY_NUMBERS, TIMED_ITERATIONS = 4_000_000, 5
"""With so many numbers in the features, a fit may take many seconds. scikit-learn doesn't tell how far it is, so that a
few iterations are timed first, which takes 2 % of them all."""
HISTORY = 10
"""Steps from which L-BFGS estimates the curvature, as in scikit-learn."""
CHUNK = 1 << 15
"""Images whose scores are in memory at a time: 131 MB for 1000 classes."""


def linear_accuracy(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    val: torch.Tensor,
    val_labels: torch.Tensor,
    classes: int,
    device: torch.device | None = None,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy, in percent.

    First the features are standardised by the mean and std of the training images, like in MAE's probe, whose
    BatchNorm has no parameters.

    Args:
        train: float32 [n, D], on any device.
        train_labels: int64 [n].
        val: float32 [m, D].
        val_labels: int64 [m].
        classes: number of classes; each must have a training image.
        device: where to fit; None: where `train` is.

    Raises:
        InputError: on the CPU, scikit-learn is not installed.
    """
    device = train.device if device is None else device
    mean, std = train.mean(0), train.std(0, correction=0).clamp(min=1e-6)
    if device.type == "cpu":
        scores = scores_by_scikit_learn((train - mean) / std, train_labels, (val - mean) / std)
    else:
        scores = scores_by_lbfgs(train, train_labels, val, classes, mean.to(device), std.to(device))
    hits = scores.topk(min(5, classes), dim=1).indices == val_labels.to(device)[:, None]
    top1, top5 = torch.stack([hits[:, 0].float().mean(), hits.any(1).float().mean()]).tolist()
    return 100 * top1, 100 * top5


def scores_by_scikit_learn(train: torch.Tensor, train_labels: torch.Tensor, val: torch.Tensor) -> torch.Tensor:
    """Scores of `val` by a fit to `train`.

    Args:
        train: standardised features, float32 [n, D], on the CPU.
        train_labels: int64 [n].
        val: standardised features, float32 [m, D].

    Returns:
        float [m, classes].

    Raises:
        InputError: scikit-learn is not installed.
    """
    with Progress(LABEL, minor=True):
        try:
            from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - an extra, and slow to import
        except ImportError as error:
            raise InputError("the linear classifier needs scikit-learn; pip install 'fastmae[demo]'") from error
    data = train.numpy(), train_labels.numpy()
    with warnings.catch_warnings(), Progress(LABEL, minor=True) as progress:
        warnings.simplefilter("ignore")  # if it has not converged by then, that is where the probe stops
        if train.numel() >= MANY_NUMBERS:
            start = time.monotonic()
            LogisticRegression(C=INVERSE_PENALTY, max_iter=TIMED_ITERATIONS).fit(*data)
            at_most = MAX_ITERATIONS / TIMED_ITERATIONS * (time.monotonic() - start)
            progress.now(f"at most {duration(at_most)}, if all {MAX_ITERATIONS} iterations are needed")
        probe = LogisticRegression(C=INVERSE_PENALTY, max_iter=MAX_ITERATIONS).fit(*data)
    scores = torch.from_numpy(probe.decision_function(val.numpy())).reshape(len(val), -1)
    if scores.shape[1] == 1:  # two classes share one score
        scores = torch.cat([-scores, scores], dim=1)
    return scores


def scores_by_lbfgs(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    val: torch.Tensor,
    classes: int,
    mean: torch.Tensor,
    std: torch.Tensor,
) -> torch.Tensor:
    """Scores of `val`, float32 [m, classes], by `fit`, whose arguments the others are: on the device of `mean`."""
    layer = fit(train, train_labels, classes, mean, std)
    return _logits(_standardised(val.to(mean.device), mean, std), layer, classes)


def fit(train: torch.Tensor, labels: torch.Tensor, classes: int, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Minimise `objective` from zero, by L-BFGS with a strong Wolfe line search.

    Args:
        train: float32 [n, D]. Features on another device than `mean` are moved by chunks, once an iteration.
        labels: int64 [n].
        classes: number of classes.
        mean: mean of each feature, float32 [D], on the device of the fit.
        std: standard deviation of each feature, float32 [D].

    Returns:
        The layer, float32 [O, D + 1], with the biases in the last column. O is the number of classes, but 1 for two
        classes: the score of the second one, where the first one's is 0.
    """
    layer = torch.zeros(1 if classes == 2 else classes, train.shape[1] + 1, device=mean.device)
    labels = labels.to(mean.device)
    optimizer = torch.optim.LBFGS(
        [layer],
        max_iter=MAX_ITERATIONS,
        max_eval=2 * MAX_ITERATIONS,
        tolerance_grad=TOLERANCE,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )

    with Progress(LABEL, "evaluations", minor=True) as progress:
        progress.now(f"{2 * MAX_ITERATIONS} at most")

        def evaluate() -> torch.Tensor:
            loss, layer.grad = objective(layer, train, labels, classes, mean, std)
            progress.advance(1)
            return loss

        optimizer.step(evaluate)
    return layer


def objective(
    layer: torch.Tensor,
    train: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    mean: torch.Tensor,
    std: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's: the mean cross-entropy plus |weights|^2 / (2 C n), without the biases; and its gradient.

    Args:
        layer: float32 [O, D + 1], as `fit` returns it.
        train: float32 [n, D].
        labels: int64 [n].
        classes: number of classes.
        mean: mean of each feature, float32 [D].
        std: standard deviation of each feature, float32 [D].

    Returns:
        The loss, and its gradient, [O, D + 1].
    """
    count, penalty = len(train), 1 / (INVERSE_PENALTY * len(train))
    weights = F.pad(layer[:, :-1], (0, 1))  # the biases have no penalty
    loss, gradient = penalty / 2 * weights.square().sum(), penalty * weights
    for part, part_labels in zip(train.split(CHUNK), labels.split(CHUNK), strict=True):
        inputs = _standardised(part.to(mean.device), mean, std)
        scores = _logits(inputs, layer, classes)
        loss = loss + F.cross_entropy(scores, part_labels, reduction="sum") / count
        errors = scores.softmax(1)
        errors.scatter_add_(1, part_labels[:, None], errors.new_full((len(errors), 1), -1.0))
        gradient += errors[:, classes - len(layer) :].T @ inputs / count
    return loss, gradient


def _standardised(features: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Features of zero mean and unit variance, and a one for the bias: [b, D + 1]."""
    return F.pad((features - mean) / std, (0, 1), value=1.0)


def _logits(inputs: torch.Tensor, layer: torch.Tensor, classes: int) -> torch.Tensor:
    """[b, classes]; with two classes, that of the first one is 0."""
    return F.pad(inputs @ layer.T, (classes - len(layer), 0))

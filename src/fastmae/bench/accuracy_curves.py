"""Accuracy over training time: the points of `bench accuracy`, and how much sooner a method reaches MAE's best."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

Ratio = Mapping[str, Any]
"""What `time_ratio` returns."""


@dataclass(frozen=True)
class Point:
    """One measurement of a method, averaged over its seeds.

    Attributes:
        seconds: training time.
        epochs: passes over the images in that time.
        knn: k-NN top-1 accuracy in percent.
        linear: top-1 accuracy of the linear classifier in percent.
        knn_std: standard deviation over the seeds; None for a single one.
        linear_std: the same for the linear classifier.
    """

    seconds: float
    epochs: float
    knn: float
    linear: float
    knn_std: float | None = None
    linear_std: float | None = None


def mean_points(seeds: Sequence[Sequence[Mapping[str, float]]]) -> list[Point]:
    """The points of a method.

    Args:
        seeds: for each seed its measurements, with `seconds`, `epoch`, `knn` and `linear`. All seeds have equally many.
    """
    points = []
    for measurements in zip(*seeds, strict=True):
        values = {key: [each[key] for each in measurements] for key in ("seconds", "epoch", "knn", "linear")}
        means = {key: round(fmean(numbers), 3) for key, numbers in values.items()}
        stds = [round(stdev(values[key]), 3) if len(measurements) > 1 else None for key in ("knn", "linear")]
        points.append(Point(round(means["seconds"], 1), means["epoch"], means["knn"], means["linear"], *stds))
    return points


def time_ratio(mae: Sequence[Point], curve: Sequence[Point], key: str, tokenize_seconds: float) -> dict[str, Any]:
    """How much sooner a method reaches MAE's best accuracy.

    Args:
        mae: MAE's points in order.
        curve: the method's points in order. The curve is linear between them.
        key: 'knn' or 'linear'.
        tokenize_seconds: added to the method's time for `with_tokenising`.

    Returns:
        `accuracy`: MAE's best, in percent, and `mae_seconds`, when it has it. `seconds`: the first time at which the
        curve reaches it; `ratio`: MAE's time divided by that; `with_tokenising`: the same with the tokenising added.
        `run_seconds`: the time of the first point that lies there or above, and `run_ratio`. None: never, or no ratio
        because the untrained encoder is best.
    """
    best = max(mae, key=lambda point: getattr(point, key))
    accuracy = getattr(best, key)
    seconds = first_reached([(point.seconds, getattr(point, key)) for point in curve], accuracy)
    run_seconds = next((point.seconds for point in curve if getattr(point, key) >= accuracy), None)

    def ratio(other: float | None) -> float | None:
        return round(best.seconds / other, 2) if best.seconds and other else None

    return {
        "accuracy": accuracy,
        "mae_seconds": best.seconds,
        "seconds": None if seconds is None else round(seconds, 1),
        "ratio": ratio(seconds),
        "with_tokenising": None if seconds is None else ratio(seconds + tokenize_seconds),
        "run_seconds": run_seconds,
        "run_ratio": ratio(run_seconds),
    }


def first_reached(curve: Sequence[tuple[float, float]], value: float) -> float | None:
    """The first time at which a curve of (seconds, value), linear between its points, reaches a value; None if
    never."""
    if curve[0][1] >= value:
        return curve[0][0]
    for (before, low), (after, high) in itertools.pairwise(curve):
        if low < value <= high:
            return before + (after - before) * (value - low) / (high - low)
    return None

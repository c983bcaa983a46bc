"""Means over seeds, and differences between two arms, paired by seed, with their 95 % intervals (Student's t)."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

CONFIDENCE = 0.95
BISECTIONS = 60
"""Halvings of the interval in which a quantile is searched: enough for double precision."""


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float]
) -> tuple[float, tuple[float, float] | None] | None:
    """Mean difference to the baseline over the seeds that both have, and its 95 % interval.

    The same seed gives both arms the same views in the same order, so part of the noise cancels out in the difference.

    Args:
        values: seed -> an arm's figure.
        baseline: seed -> the baseline's.

    Returns:
        The mean, and the interval (None for a single seed); None if they have no seed in common.
    """
    differences = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    if not differences:
        return None
    mean, std = mean_and_std(differences)
    if std is None:
        return mean, None
    half_width = t_quantile(0.5 + CONFIDENCE / 2, len(differences) - 1) * std / math.sqrt(len(differences))
    return mean, (mean - half_width, mean + half_width)


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, for a probability above 0.5, by bisection of its distribution function."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < probability:
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def t_probability(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0 and whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    if not odd:
        return (1 + sine * total) / 2
    return 0.5 + (theta + (sine * total if degrees > 1 else 0.0)) / math.pi

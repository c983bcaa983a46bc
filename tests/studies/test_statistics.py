"""Student's t, and differences paired by seed."""

import math

import pytest

from fastmae.studies.statistics import mean_and_std, paired_difference, t_probability, t_quantile

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 10, 31, 100])
def test_quantiles_and_probabilities_are_those_of_students_t(degrees):
    assert t_quantile(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)
    assert t_probability(1.3, degrees) == pytest.approx(stats.t.cdf(1.3, degrees), rel=1e-12)


def test_the_interval_is_that_of_a_paired_t_test():
    ours, base = {0: 30.0, 1: 32.5, 2: 31.0}, {0: 28.0, 1: 31.0, 2: 30.5}
    mean, (low, high) = paired_difference(ours, base)
    expected = stats.ttest_rel(list(ours.values()), list(base.values())).confidence_interval(0.95)
    assert mean == pytest.approx((2.0 + 1.5 + 0.5) / 3)
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_only_seeds_that_both_arms_have_are_paired():
    assert paired_difference({0: 3.0, 1: 9.0}, {0: 1.0, 2: 0.0}) == (2.0, None)
    assert paired_difference({0: 3.0}, {1: 1.0}) is None


def test_one_seed_has_no_standard_deviation():
    assert mean_and_std([3.0]) == (3.0, None)
    assert mean_and_std([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))

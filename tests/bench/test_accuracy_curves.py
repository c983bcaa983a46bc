"""Curves and ratios of `bench accuracy` against their definitions."""

import pytest

from fastmae.bench.accuracy_curves import Point, first_reached, mean_points, time_ratio


def points(*pairs):
    return [Point(seconds, seconds / 10, value, value) for seconds, value in pairs]


def test_the_first_time_at_which_a_curve_reaches_a_value():
    curve = [(0.0, 10.0), (10.0, 30.0), (20.0, 20.0), (30.0, 50.0)]
    assert first_reached(curve, 20.0) == pytest.approx(5.0)
    assert first_reached(curve, 35.0) == pytest.approx(25.0)
    assert first_reached(curve, 10.0) == 0.0
    assert first_reached(curve, 60.0) is None


def test_the_ratio_is_the_one_of_the_times_to_maes_best_accuracy():
    mae, curve = points((0, 10), (50, 40), (100, 38)), points((0, 10), (10, 70))
    assert time_ratio(mae, curve, "knn", tokenize_seconds=20.0) == {
        "accuracy": 40,
        "mae_seconds": 50,
        "seconds": 5.0,
        "ratio": 10.0,
        "with_tokenising": 2.0,
        "run_seconds": 10,
        "run_ratio": 5.0,
    }


def test_there_is_no_ratio_if_a_method_never_reaches_maes_accuracy():
    ratio = time_ratio(points((0, 10), (50, 40)), points((0, 10), (50, 20)), "knn", tokenize_seconds=20.0)
    keys = ("seconds", "ratio", "with_tokenising", "run_seconds", "run_ratio")
    assert [ratio[key] for key in keys] == 5 * [None]


def test_there_is_no_ratio_if_the_untrained_encoder_is_maes_best():
    ratio = time_ratio(points((0, 40), (50, 30)), points((0, 40), (50, 60)), "linear", tokenize_seconds=20.0)
    assert ratio["seconds"] == 0
    assert [ratio[key] for key in ("ratio", "with_tokenising", "run_ratio")] == 3 * [None]


def test_points_are_means_over_the_seeds_with_their_deviations():
    def measured(seconds, knn, linear):
        return {"seconds": seconds, "epoch": 2.5, "knn": knn, "linear": linear}

    one, other = [measured(1.0, 10, 20), measured(4.0, 30, 30)], [measured(2.0, 12, 20), measured(5.0, 30, 36)]
    assert mean_points([one, other]) == [
        Point(1.5, 2.5, 11, 20, pytest.approx(2**0.5, abs=1e-3), 0),
        Point(4.5, 2.5, 30, 33, 0, pytest.approx(18**0.5, abs=1e-3)),
    ]
    assert mean_points([one])[0] == Point(1.0, 2.5, 10, 20, None, None)

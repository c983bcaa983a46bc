"""`bench accuracy`: the ratio against its definition, and the real command on tiny images."""

import itertools

import pytest
from PIL import Image

from fastmae.bench.bench_accuracy import FASTMAE, MAE, Point, first_reached, time_ratio
from fastmae.cli import run


def points(*pairs):
    return [Point(seconds, value, value, None, None) for seconds, value in pairs]


def test_the_first_time_at_which_a_curve_reaches_a_value():
    curve = [(0.0, 10.0), (10.0, 30.0), (20.0, 20.0), (30.0, 50.0)]
    assert first_reached(curve, 20.0) == pytest.approx(5.0)
    assert first_reached(curve, 35.0) == pytest.approx(25.0)
    assert first_reached(curve, 10.0) == 0.0
    assert first_reached(curve, 60.0) is None


def test_the_ratio_is_the_one_of_the_times_to_maes_best_accuracy():
    curves = {MAE: points((0, 10), (50, 40), (100, 38)), FASTMAE: points((0, 10), (10, 70))}
    ratio = time_ratio(curves, "knn", tokenize_seconds=20.0)
    assert ratio == {"accuracy": 40, "mae_seconds": 50, "fastmae_seconds": 5.0, "ratio": 10.0, "with_tokenising": 2.0}


def test_there_is_no_ratio_if_fastmae_never_reaches_maes_accuracy():
    curves = {MAE: points((0, 10), (50, 40)), FASTMAE: points((0, 10), (50, 20))}
    ratio = time_ratio(curves, "knn", tokenize_seconds=20.0)
    assert [ratio[key] for key in ("ratio", "with_tokenising", "fastmae_seconds")] == [None, None, None]


@pytest.mark.slow
def test_both_methods_are_trained_and_measured_and_a_second_call_finds_the_results(
    photos, tmp_path, printed_json, error_line
):
    out = tmp_path / "acc"
    args = ["bench", "accuracy", str(photos), "--out", str(out)]
    args += "--minutes 0.04 --points 2 --device cpu --workers 0 --json".split()
    assert run(args) == 0
    result = printed_json()
    for name in (FASTMAE, MAE):
        curve = [row for row in result["rows"] if row["method"] == name]
        assert 2 <= len(curve) <= 3  # one before training; two during it, or one if the time allows a single step
        assert curve[0]["seconds"] == 0
        assert all(before["seconds"] < after["seconds"] for before, after in itertools.pairwise(curve))
        assert all(0 <= row[key] <= 100 for row in curve for key in ("knn", "linear"))
    assert result["tokenize_seconds"] > 0
    assert (out / "accuracy.html").read_text().count("<svg") == 2
    with Image.open(out / "accuracy.png") as figure:
        assert figure.width > 1000
    assert "| FastMAE |" in (out / "accuracy.md").read_text()
    assert run(args) == 0
    assert printed_json()["rows"] == result["rows"]
    assert "--points 2" in error_line([*args, "--points", "3"])


@pytest.mark.parametrize("options", ["--mae-recipe mae_300ep", "--minutes 0", "--seeds 0"])
def test_what_can_not_be_compared_names_its_option(options, photos, tmp_path, error_line):
    args = ["bench", "accuracy", str(photos), "--out", str(tmp_path / "acc"), *options.split()]
    assert options.split()[0] in error_line(args)
    assert not (tmp_path / "acc").exists()

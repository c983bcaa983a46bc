"""`bench accuracy`: the ratio against its definition, and the real command on tiny images."""

import itertools
import json

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


def test_the_ratio_is_of_the_times_to_maes_best_accuracy():
    tracks = {MAE: points((0, 10), (50, 40), (100, 38)), FASTMAE: points((0, 10), (10, 70))}
    found = time_ratio(tracks, "knn", tokenising=20.0)
    assert found == {"accuracy": 40, "mae_seconds": 50, "fastmae_seconds": 5.0, "ratio": 10.0, "with_tokenising": 2.0}
    never = time_ratio({MAE: points((0, 10), (50, 40)), FASTMAE: points((0, 10), (50, 20))}, "knn", 20.0)
    assert (never["ratio"], never["with_tokenising"], never["fastmae_seconds"]) == (None, None, None)


@pytest.mark.slow
def test_the_command_trains_both_measures_on_the_way_and_goes_on(photos, tmp_path, capsys):
    args = [
        "bench",
        "accuracy",
        str(photos),
        "--out",
        str(tmp_path / "acc"),
        "--minutes",
        "0.04",
        "--points",
        "2",
        "--device",
        "cpu",
    ]
    assert run([*args, "--workers", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in (FASTMAE, MAE):
        track = [row for row in result["rows"] if row["method"] == name]
        assert 2 <= len(track) <= 3  # before the start, and two on the way, or one if the time allows but a step
        assert track[0]["seconds"] == 0
        assert all(before["seconds"] < after["seconds"] for before, after in itertools.pairwise(track))
        assert all(0 <= row[key] <= 100 for row in track for key in ("knn", "linear"))
    assert result["tokenize_seconds"] > 0
    page = (tmp_path / "acc" / "accuracy.html").read_text()
    assert page.count("<svg") == 2
    with Image.open(tmp_path / "acc" / "accuracy.png") as figure:
        assert figure.width > 1000
    assert "| FastMAE |" in (tmp_path / "acc" / "accuracy.md").read_text()
    assert run([*args, "--workers", "0", "--json"]) == 0  # again: all is there
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == result["rows"]
    assert run([*args, "--workers", "0", "--points", "3"]) == 2  # what was measured is not put under another heading
    assert "holds a bench with --points 2, not 3" in capsys.readouterr().err


def test_what_can_not_be_compared_is_one_line(photos, tmp_path, capsys):
    for options, says in (
        (["--mae-recipe", "mae_300ep"], "both must be alike"),
        (["--minutes", "0"], "--minutes 0"),
        (["--seeds", "0"], "--seeds 0"),
    ):
        assert run(["bench", "accuracy", str(photos), "--out", str(tmp_path / "acc"), *options]) == 2
        assert says in capsys.readouterr().err.splitlines()[-1]

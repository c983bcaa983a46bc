import json
import shutil

import pytest

from fastmae.cli import run
from fastmae.runs.folder import read_evaluations, read_metrics

STEPS = 8


def demo(capsys, *args):
    assert run(["demo", "--steps", str(STEPS), "--json", *map(str, args)]) == 0
    stdout, err = capsys.readouterr()
    return json.loads(stdout.splitlines()[-1]), err


def test_the_demo_compares_four_kinds_of_features_on_fixed_work_and_draws_a_self_contained_page(
    photos, tmp_path, capsys
):
    out = tmp_path / "demo"
    result, err = demo(capsys, "--images", photos, "--out", out)
    assert [row["features"] for row in result["rows"]] == [
        "random init",
        "MAE (pixels)",
        "FastMAE",
        "teacher (efficientnet-lite0)",
    ]
    assert result["knn"].keys() == {"fastmae", "mae", "random", "teacher"}
    assert result["knn"]["teacher"] == 100.0
    assert result["top1"] == result["knn"]["fastmae"] == read_evaluations(out / "fastmae")[-1]["knn_top1"]
    assert [read_metrics(out / name)[-1]["step"] for name in ("fastmae", "mae")] == [STEPS, STEPS // 4]
    assert "demo: your images, 30 to train on" in err and " here" in err  # said before it begins
    assert "FastMAE" in err  # with --json, the table is on standard error
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,iVBOR") == 4
    assert page.count("<svg") == 3
    assert "http" not in page.replace("http-equiv", "")
    again, _ = demo(capsys, "--images", photos, "--out", out)  # finished: only the bounds and the page are made again
    assert again["rows"] == result["rows"]


@pytest.mark.slow
def test_the_demos_numbers_depend_neither_on_the_number_of_threads_nor_on_a_kill(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one, _ = demo(capsys, "--images", photos, "--out", tmp_path / "one")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    two, _ = demo(capsys, "--images", photos, "--out", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "mae")  # as if it had not been begun
    again, _ = demo(capsys, "--images", photos, "--out", tmp_path / "two")
    losses = [
        [entry["loss"] for entry in read_metrics(tmp_path / name / run)]
        for run in ("fastmae", "mae")
        for name in ("one", "two")
    ]
    assert losses[0] == losses[1] and losses[2] == losses[3]
    assert one["knn"] == two["knn"] == again["knn"]


def test_images_without_labels_are_shown_by_pictures_alone(photos, tmp_path, capsys):
    result, _ = demo(capsys, "--images", photos / "train" / "flower", "--out", tmp_path / "demo")
    assert set(result["knn"].values()) == {None}
    page = (tmp_path / "demo" / "index.html").read_text()
    assert page.count("data:image/png;base64,iVBOR") == 4
    assert "k-NN" not in page


def test_a_demo_with_other_steps_in_the_same_folder_is_refused(photos, tmp_path, capsys):
    out = tmp_path / "demo"
    demo(capsys, "--images", photos, "--out", out)
    assert run(["demo", "--images", str(photos), "--out", str(out), "--steps", "12"]) == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert f"{out}: holds a demo with --steps {STEPS}, not 12; give the same, or" in line and "--out" in line
    assert not before

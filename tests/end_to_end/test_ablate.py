"""`fastmae ablate`: a table of runs, continued after an interruption; tables that are refused before any training."""

import json

import pytest

from fastmae.cli import run


def test_a_table_is_trained_row_by_row_and_continued_where_it_stopped(photos, tmp_path, capsys, error_line):
    out = tmp_path / "ablations"
    args = ["ablate", "targets", str(photos), "--out", str(out), *"--epochs 1 --workers 0 --device cpu --json".split()]
    assert run(args) == 0
    stdout, err = capsys.readouterr()
    rows = json.loads(stdout.splitlines()[-1])["rows"]
    assert [row["row"] for row in rows] == ["MAE, pixels", "HOG", "FastMAE, stored tokens", "FastMAE, online teacher"]
    assert all(0 <= row["knn"] <= 100 and 0 <= row["linear"] <= 100 and row["seconds"] > 0 for row in rows)
    assert rows[2]["paper"].startswith("84.3")
    assert "Table 2" in err
    assert (out / "targets.html").read_text().count("<svg") == 2

    measured = out / "targets" / "HOG-seed0.json"
    measured.unlink()  # as after a kill between the end of a run and its measurement
    checkpoint = out / "targets" / "MAE__pixels-seed0" / "checkpoint.pt"
    written_at = checkpoint.stat().st_mtime_ns
    assert run(args) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == rows
    assert measured.exists()
    assert checkpoint.stat().st_mtime_ns == written_at
    assert "epochs" in error_line([*args, "--epochs", "2"])


@pytest.mark.parametrize(
    ("table", "images", "options", "named"),
    [
        ("tricks", "", "--teacher efficientnet-lite0,efficientnet-lite2", "--teacher"),
        ("encoders", "", "--recipe vit_base_60ep", "--recipe"),
        ("encoder", "", "", "encoders"),
        ("tricks", "train", "", "train"),
    ],
)
def test_a_table_that_cannot_be_run_is_refused_before_anything_is_written(
    table, images, options, named, photos, tmp_path, error_line
):
    out = tmp_path / "a"
    assert named in error_line(["ablate", table, str(photos / images), "--out", str(out), *options.split()])
    assert not out.exists()


def test_images_of_a_single_class_are_refused_before_anything_is_written(photos, tmp_path, error_line):
    images, out = tmp_path / "one", tmp_path / "a"
    for split in ("train", "val"):
        (images / split).mkdir(parents=True)
        (images / split / "china").symlink_to(photos / split / "china")
    assert str(images / "train") in error_line(["ablate", "tricks", str(images), "--out", str(out)])
    assert not out.exists()

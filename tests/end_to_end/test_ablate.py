"""`fastmae ablate` by its real processes: a study that is continued, interrupted, fails in part, and is refused."""

import json
import os
import shutil
import signal
import time

import pytest

from fastmae.cli import run

STUDY = """
title: Two norms
base: {epochs: 1, encoder_depth: 2, encoder_width: 64, encoder_heads: 2, decoder_width: 32, decoder_heads: 2,
  batch_size: 8}
teachers: {cnn: efficientnet-lite0}
arms:
  patch: {norm: patch}
  channel: {options: {norm: channel}, note: "84.4"}
  tuned: {options: {norm: none}, tune: {base_lr: [8.0e-3, 1.6e-2]}}
  pixels: {recipe: mae_tiny_cpu, decoder_depth: 1}
"""
SMALL = "--workers 0 --device cpu --json".split()


@pytest.fixture
def study(tmp_path):
    file = tmp_path / "norms.yaml"
    file.write_text(STUDY)
    return file


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A folder for the store, so that it is made once for all tests."""
    return tmp_path_factory.mktemp("stores")


@pytest.mark.timeout(600)
def test_a_study_is_tuned_measured_continued_and_drawn_again(study, stores, photos, tmp_path, printed_json, error_line):
    out = tmp_path / "out"
    args = ["ablate", str(study), str(photos), "--out", str(out), "--stores-in", str(stores), *SMALL]
    assert run([*args, "--seeds", "2", "--jobs", "2"]) == 0
    result = printed_json()
    rows = {row["arm"]: row for row in result["rows"]}
    assert list(rows) == ["patch", "channel", "tuned", "pixels"]
    for row in rows.values():
        assert 0 <= row["knn"] <= 100 and 0 <= row["linear"] <= 100
        assert row["seconds"] > 0 and row["gflops_per_image"] > 0 and row["seeds"] == 2
        assert row["knn_std"] >= 0
    assert rows["patch"]["knn_difference"] is None
    low, high = rows["channel"]["knn_interval"]
    assert low <= rows["channel"]["knn_difference"] <= high
    assert rows["channel"]["knn_difference"] == pytest.approx(rows["channel"]["knn"] - rows["patch"]["knn"], abs=0.01)
    assert result["split"] == "val"
    assert _timed_rounds(out) == [2] * 4

    written = json.loads((out / "study.json").read_text())
    assert len(written["runs"]) == 4 * 2
    (tuning,) = written["tuning"]
    best = max(tuning["candidates"], key=lambda candidate: candidate["knn"])
    assert tuning["chosen"] == best["options"]
    assert rows["tuned"]["tuned"] == f"base_lr={best['options']['base_lr']}"
    name = photos.name
    candidates = sorted((out / "runs" / name / "cnn" / "tuned").iterdir())
    measured_on_val = [folder.name for folder in candidates if (folder / "seed0" / "val.json").exists()]
    assert measured_on_val == [f"base_lr_{best['options']['base_lr']}"]
    assert all((folder / "seed0" / "held-out.json").exists() for folder in candidates)

    seed0 = out / "runs" / name / "cnn" / "patch" / "seed0"
    checkpoint, figures = seed0 / "pretrain" / "checkpoint.pt", seed0 / "val.json"
    trained_at, before = checkpoint.stat().st_mtime_ns, json.loads(figures.read_text())
    figures.unlink()  # as after a kill between the end of a run and its measurement
    (out / "study.html").unlink()
    assert run([*args, "--seeds", "2"]) == 0
    assert printed_json()["rows"] == result["rows"]
    assert json.loads(figures.read_text()) == before
    assert checkpoint.stat().st_mtime_ns == trained_at

    (out / "study.html").unlink()
    assert run(["report", str(out)]) == 0
    page = (out / "study.html").read_text()
    assert page.count("<svg") == 2
    assert "84.4" in page

    line = error_line([*args, "--epochs", "2"])
    assert "--epochs" in line
    assert "arm patch" in line


def _timed_rounds(out):
    """How often each arm was timed."""
    speeds = json.loads((out / "timing" / "0" / "speeds.json").read_text())
    return [len(arm["images_per_second"]) for arm in speeds.values()]


@pytest.mark.timeout(600)
def test_with_seconds_the_epochs_are_those_that_the_median_speed_allows(study, stores, photos, tmp_path, printed_json):
    study.write_text(STUDY.partition("  channel")[0])
    out = tmp_path / "out"
    args = ["ablate", str(study), str(photos), "--out", str(out), "--stores-in", str(stores), "--seconds", "1", *SMALL]
    assert run(args) == 0
    assert _timed_rounds(out) == [5]
    (row,) = printed_json()["rows"]
    images = json.loads((out / "study.json").read_text())["data"][photos.name]["train"]
    assert row["epochs"] == pytest.approx(row["images_per_second"] / images, abs=0.01)


@pytest.mark.timeout(600)
def test_a_failing_run_leaves_the_others_and_is_named(study, stores, photos, tmp_path, capsys):
    study.write_text(
        STUDY.partition("  tuned")[0] + "  wild: {base_lr: 9.0e+3, warmup_epochs: 0, weight_decay: 1.0e+6}\n"
    )
    out = tmp_path / "out"
    args = ["ablate", str(study), str(photos), "--out", str(out), "--stores-in", str(stores), "--held-out", *SMALL]
    assert run(args) == 1
    stdout, err = capsys.readouterr()
    assert "arm wild" in err.splitlines()[-1]
    result = json.loads(stdout.splitlines()[-1])
    rows = {row["arm"]: row for row in result["rows"]}
    assert rows["patch"]["knn"] is not None and rows["channel"]["knn"] is not None
    assert rows["wild"]["knn"] is None
    assert result["split"] == "held-out"
    assert not list(out.rglob("val.json"))


@pytest.mark.timeout(600)
def test_a_stopped_study_saves_its_runs_and_continues_them(study, stores, photos, tmp_path, warm, printed_json):
    study.write_text(STUDY.partition("  channel")[0])
    out = tmp_path / "out"
    args = ["ablate", str(study), str(photos), "--out", str(out), "--stores-in", str(stores), *SMALL]
    args += ["--epochs", "60"]
    process = warm.start(args, tmp_path / "log.txt")
    run_folder = out / "runs" / photos.name / "cnn" / "patch" / "seed0" / "pretrain"
    while not (run_folder / "metrics.jsonl").exists() or not (run_folder / "metrics.jsonl").read_text():
        assert process.poll() is None, process.output()
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 130
    assert "0 of 1 run" in process.output().splitlines()[-1]
    assert (run_folder / "checkpoint.pt").exists()
    assert run(args) == 0
    assert printed_json()["rows"][0]["epochs"] == 60
    assert "from step" in (run_folder.parent / "log.txt").read_text()


def test_a_student_that_cannot_be_built_is_refused_before_anything_is_written(study, photos, tmp_path, error_line):
    study.write_text("arms: {a: {}, b: {encoder_heads: 3}}")
    out = tmp_path / "out"
    line = error_line(["ablate", str(study), str(photos), "--out", str(out)])
    assert f"{study}: arm b: " in line
    study.write_text("arms: {a: {}, b: {loss: cosin}}")
    assert "did you mean 'cosine'" in error_line(["ablate", str(study), str(photos), "--out", str(out)])
    assert "train" in error_line(["ablate", str(study), str(photos / "train"), "--out", str(out)])
    study.write_text("{tokenize: {patch_size: 4}, arms: {a: {}, b: {target: hog}}}")
    assert "arm b: --target hog: patches of 4 px" in error_line(["ablate", str(study), str(photos), "--out", str(out)])
    study.write_text("{tokenize: {middle_size: '96,128'}, arms: {a: {}, b: {target: teacher}}}")
    assert "arm b: --target teacher: needs a store of one" in error_line(
        ["ablate", str(study), str(photos), "--out", str(out)]
    )
    study.write_text("{finetune: {batch_size: 7}, arms: {a: {}}}")
    assert "finetune: --batch-size 7" in error_line(["ablate", str(study), str(photos), "--out", str(out)])
    assert not out.exists()


def test_damaged_images_and_like_names_are_refused_before_anything_is_written(study, photos, tmp_path, error_line):
    images, out = tmp_path / "my photos", tmp_path / "out"
    shutil.copytree(photos, images)
    damaged = images / "val" / "china" / "99.jpg"
    damaged.write_bytes(b"no picture")
    line = error_line(["ablate", str(study), str(images), "--out", str(out), *SMALL])
    assert str(damaged) in line and "remove it" in line
    (tmp_path / "my_photos").symlink_to(photos)
    assert "'my photos'" in error_line(
        ["ablate", str(study), str(images), str(tmp_path / "my_photos"), "--out", str(out)]
    )
    assert not out.exists()


def test_images_of_a_single_class_are_refused_before_anything_is_written(photos, tmp_path, error_line):
    images, out = tmp_path / "one", tmp_path / "a"
    for split in ("train", "val"):
        (images / split).mkdir(parents=True)
        (images / split / "china").symlink_to(photos / split / "china")
    assert str(images / "train") in error_line(["ablate", "tricks", str(images), "--out", str(out)])
    assert not out.exists()

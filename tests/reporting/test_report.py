"""The page of a real run: what it shows, that it needs no other file, and how a browser shows it."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from fastmae.cli import run

BROWSERS = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]


@pytest.fixture(scope="module")
def measured_run(vit_store, photos, tiny_student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    args = [*tiny_student, "--epochs", "2", "--knn-every", "1", "--knn-data", str(photos), "--workers", "0"]
    assert run(["pretrain", str(vit_store), str(folder), *args]) == 0
    return folder


@pytest.fixture(scope="module")
def page(measured_run, photos, tmp_path_factory):
    """The page with a fine-tuned run and a benchmark's table added."""
    folder = tmp_path_factory.mktemp("added")
    short = ["--epochs", "1", "--workers", "0", "--batch-size", "8"]
    assert run(["finetune", str(measured_run), str(photos), "--out", str(folder / "tuned"), *short]) == 0
    table = "# Step\n\n- CPU: some & other\n\n| method | s |\n| --- | ---: |\n| MAE <b> | 1.5 |\n\nA note.\n"
    (folder / "step.md").write_text(table)
    Image.new("RGB", (40, 30)).save(folder / "step.png")
    also = f"{folder / 'tuned'},{folder / 'step.md'}"
    assert run(["report", str(measured_run), "--images", "3", "--also", also]) == 0
    return measured_run / "report.html"


def test_the_page_shows_everything_and_needs_no_other_file(page):
    html = page.read_text()
    for heading in (
        "Training curves",
        "Predictions",
        "Attention in the last block",
        "Nearest neighbours",
        "finetune: tuned",
        "Step",
        "Settings",
        "Images and store",
    ):
        assert f"<h2>{heading}</h2>" in html, heading
    pictures = ("predictions", "attention", "neighbours", "confusion matrix", "benchmark's figure")
    assert html.count("data:image/png;base64,iVBOR") == len(pictures)
    charts = ("losses", "k-NN accuracy", "learning rate", "images per second", "gradient norm")
    assert html.count("<svg") == len(charts)
    assert "http" not in html
    assert "the decoder saw the patches alone" in html  # about the class token, whose attention is drawn


def test_the_page_escapes_a_benchmarks_text(page):
    html = page.read_text()
    assert "MAE &lt;b&gt;" in html
    assert "CPU: some &amp; other" in html
    assert '<p class="note">A note.</p>' in html


@pytest.mark.skipif(not BROWSERS, reason="needs Chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_whole_page_in_light_and_dark(page, scheme, tmp_path):
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
        "--window-size=1000,3000",
        f"--screenshot={tmp_path / 'shot.png'}",
    ]
    subprocess.run([BROWSERS[0], *flags, page.as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(tmp_path / "shot.png") as picture:
        pixels = np.asarray(picture.convert("L"), dtype=float)
    margin = pixels[:, :8].mean()
    assert (margin > 200) if scheme == "light" else (margin < 60)
    rows_with_content = np.abs(pixels - margin).max(1) > 40
    assert rows_with_content[:1500].mean() > 0.5  # text, curves and pictures all the way down
    first_chart = pixels[150:420, 50:480]
    assert (np.abs(first_chart - margin) > 60).mean() > 0.004  # axes and lines in the page's own text colour


def test_a_run_with_pixels_as_target_is_shown_from_a_store_that_was_moved(vit_store, tiny_student, tmp_path, capsys):
    mae_run, out = tmp_path / "mae", tmp_path / "page.html"
    args = [*tiny_student, "--target", "pixels", "--epochs", "1", "--workers", "0"]
    assert run(["pretrain", str(vit_store), str(mae_run), *args]) == 0
    (mae_run / "inputs.json").unlink()
    assert run(["report", str(mae_run)]) == 2
    assert "--store STORE" in capsys.readouterr().err
    moved = ["--store", str(vit_store), "--out", str(out), "--images", "2", "--json"]
    assert run(["report", str(mae_run), *moved]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["html"] == str(out)
    assert "pixels (MAE)" in out.read_text()


def test_the_predictions_of_a_student_without_a_decoder_are_described_as_what_they_are(
    vit_store, tiny_student, tmp_path
):
    folder = tmp_path / "run"
    args = [*tiny_student, "--decoder-depth", "0", "--epochs", "1", "--workers", "0"]
    assert run(["pretrain", str(vit_store), str(folder), *args]) == 0
    assert run(["report", str(folder), "--images", "2"]) == 0
    html = (folder / "report.html").read_text()
    assert "Here it saw the whole view" in html
    assert "The encoder saw only" not in html
    assert "predictions were read from the patches alone" in html
    assert "--decoder-class-token" not in html
    assert "decoder_depth" in html and "decoder_width" not in html  # what has an effect


def test_a_path_that_can_not_be_shown_is_named_in_one_line(measured_run, tmp_path, capsys):
    (tmp_path / "empty.md").write_text("# A title and no table\n")
    cases = {
        str(tmp_path): [str(tmp_path)],
        "no.md": [str(measured_run), "--also", str(tmp_path / "no.md")],
        "empty.md": [str(measured_run), "--also", str(tmp_path / "empty.md")],
        f"--also {measured_run}": [str(measured_run), "--also", str(measured_run)],  # of pretrain, not supervised
        f"--also {tmp_path}": [str(measured_run), "--also", str(tmp_path)],
    }
    for named, args in cases.items():
        assert run(["report", *args]) == 2
        assert named in capsys.readouterr().err.splitlines()[-1]

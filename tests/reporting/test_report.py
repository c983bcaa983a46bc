"""The page of a run: what stands on it, that it needs nothing beside it, and how a real browser shows it in light and dark."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.cli import run
from fastmae.reporting.charts import Curves, bars
from fastmae.reporting.pictures import _as_pixels
from fastmae.student.targets import NormPix

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def measured_run(vit_store, photos, tiny_student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    args = [*tiny_student, "--epochs", "2", "--knn-every", "1", "--knn-data", str(photos), "--workers", "0"]
    assert run(["pretrain", str(vit_store), str(folder), *args]) == 0
    return folder


@pytest.fixture(scope="module")
def page(measured_run, photos, tmp_path_factory):
    made = tmp_path_factory.mktemp("also")
    args = ["--epochs", "1", "--workers", "0", "--batch-size", "8"]
    assert run(["finetune", str(measured_run), str(photos), "--out", str(made / "tuned"), *args]) == 0
    table = "# Step\n\n- CPU: some & other\n\n| method | s |\n| --- | ---: |\n| MAE <b> | 1.5 |\n\nA note.\n"
    (made / "step.md").write_text(table)
    Image.new("RGB", (40, 30)).save(made / "step.png")
    assert run(["report", str(measured_run), "--images", "3", "--also", f"{made / 'tuned'},{made / 'step.md'}"]) == 0
    return measured_run / "report.html"


def test_everything_stands_on_one_page_that_needs_nothing_beside_it(page):
    text = page.read_text()
    for heading in (
        "How it went",
        "What it predicts",
        "Where the last block looks",
        "What it finds alike",
        "finetune: tuned",
        "Step",
        "Settings",
    ):
        assert f"<h2>{heading}</h2>" in text, heading
    assert (
        text.count("data:image/png;base64,iVBOR") == 5
    )  # predictions, attention, neighbours, confusion, the bench's figure
    assert text.count("<svg") == 5  # losses, kNN, rate, images a second, gradient
    assert "http" not in text
    assert "MAE &lt;b&gt;" in text
    assert '<p class="note">A note.</p>' in text
    assert "CPU: some &amp; other" in text


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_whole_in_light_and_dark(page, scheme, tmp_path):
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
    ]  # fmt: skip
    shot = [BROWSER, *flags, "--window-size=1000,3000", f"--screenshot={tmp_path / 'shot.png'}", page.as_uri()]
    subprocess.run(shot, check=True, capture_output=True, timeout=120)
    with Image.open(tmp_path / "shot.png") as picture:
        pixels = np.asarray(picture.convert("L"), dtype=float)
    margin = pixels[:, :8].mean()
    assert (margin > 200) if scheme == "light" else (margin < 60)
    rows = np.abs(pixels - margin).max(1) > 40
    assert rows[:1500].mean() > 0.5  # text, curves and pictures all the way down
    curve = pixels[150:420, 50:480]
    assert (np.abs(curve - margin) > 60).mean() > 0.004  # axes and lines in the page's own ink


def test_pixels_come_back_from_their_normalised_patches():
    images = torch.rand(2, 3, 32, 32)
    target = NormPix(8, 3)

    class Batch:
        pixels = images

    assert torch.allclose(_as_pixels(target(Batch(), images), images, 8), images, atol=1e-4)


def test_a_run_of_maes_own_target_and_a_moved_store_are_drawn(vit_store, tiny_student, tmp_path, capsys):
    args = [*tiny_student, "--target", "pixels", "--epochs", "1", "--workers", "0"]
    assert run(["pretrain", str(vit_store), str(tmp_path / "mae"), *args]) == 0
    (tmp_path / "mae" / "inputs.json").unlink()
    assert run(["report", str(tmp_path / "mae")]) == 2
    assert "give --store STORE" in capsys.readouterr().err
    out = tmp_path / "page.html"
    assert (
        run(["report", str(tmp_path / "mae"), "--store", str(vit_store), "--out", str(out), "--images", "2", "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["html"] == str(out)
    assert "predicting MAE&#39;s pixels" in out.read_text()


def test_what_can_not_be_shown_is_one_line(measured_run, page, photos, tmp_path, capsys):
    cases = [
        ([str(tmp_path)], "not a run's folder"),
        ([str(measured_run), "--also", str(tmp_path / "no.md")], "no such file"),
        ([str(measured_run), "--also", str(measured_run)], "no finished run of finetune"),
        ([str(measured_run), "--images", "0"], "--images 0"),
    ]
    for args, says in cases:
        assert run(["report", *args]) == 2
        err = capsys.readouterr().err
        assert says in err.splitlines()[-1]


def test_charts_take_the_pages_ink_and_leave_out_what_is_not_known():
    drawn = Curves(
        {"a": [{"x": 1, "y": 2.0}, {"x": 2, "y": None}, {"x": 3, "y": 4.0}], "b": [{"x": 1}]}, "x", "y", "x", "y"
    ).svg()
    assert "currentColor" in drawn
    assert bars({"one <i>": 50.0}, "percent").count("&lt;i&gt;") >= 1

"""`fastmae detect`, as a user calls it."""

import json
import statistics

import pytest
from PIL import Image

from fastmae.cli import run
from fastmae.evaluate.detection.average_precision import METRICS
from fastmae.runs.encoder import open_encoder

TINY = [
    "--no-pretrained", "--device", "cpu", "--workers", "0", "--head-channels", "16", "--image-size", "64", "--epochs", "2",
    "--batch-size", "2", "--eval-every", "2", "--log-every", "1", "--pictures", "2",
]  # fmt: skip
MIXED = ["--checkpoint-activations", "--precision", "bf16-mixed"]
ENCODER = "timm/vit_tiny_patch16_224"


def test_a_run_gives_the_contracts_figures_and_a_picture_and_is_itself_a_run(rectangles, tmp_path, capsys):
    data, out = rectangles(), tmp_path / "out"
    command = ["detect", ENCODER, str(data), "--out", str(out), *TINY, "--json"]
    assert run(command) == 0
    printed, told = capsys.readouterr()
    assert len(printed.splitlines()) == 1
    result = json.loads(printed)
    assert set(METRICS) <= set(result)
    assert all(
        0 <= result[name] <= 100 for name in ("box_ap", "box_ap_50", "box_ap_75", "mask_ap", "mask_ap_50", "mask_ap_75")
    )
    assert result["box_ap_large"] is None  # no object is
    assert "no object in val to measure box_ap_medium, box_ap_large" in told
    assert (result["epochs"], result["steps"]) == (2, 4)
    with Image.open(out / "detections.png") as picture:
        assert picture.width > 500
    described = json.loads((out / "run.json").read_text())
    assert described["classes"] == [{"id": 3, "name": "red"}, {"id": 8, "name": "blue"}]
    assert described["limits"] == {"image_size": 64, "max_size": 107}
    assert open_encoder(str(out)).patch_size == 16

    assert run(command) == 0  # finished: it only says so again
    assert json.loads(capsys.readouterr().out) == result
    assert run([*command, "--head-channels", "8"]) == 2
    assert "options head_channels: 16, not 8" in capsys.readouterr().err


def test_settings_are_printed_and_losses_logged_in_mixed_precision_too(rectangles, tmp_path, capsys):
    data, out = rectangles(lambda content: content["annotations"][0].update(bbox=[5, 5, 0, 9])), tmp_path / "out"
    assert run(["detect", ENCODER, str(data), "--out", str(out), *TINY, "--epochs", "1", *MIXED]) == 0
    printed = capsys.readouterr().out
    assert "4 images, 7 objects of 2 classes, 0 crowds; 1 dropped for" in printed
    assert "images of 64 pixels on the short side, at most 107 on the long" in printed
    entry = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    parts = [entry[f"loss_{name}"] for name in ("classifier", "box_reg", "mask", "objectness", "rpn_box_reg")]
    assert entry["loss"] == pytest.approx(sum(parts), rel=1e-4)


def test_small_images_are_taken_at_their_median_size(rectangles, tmp_path, capsys):
    data = rectangles()
    images = json.loads((data / "my_train" / "annotations.json").read_text())["images"]
    median = int(statistics.median(min(image["width"], image["height"]) for image in images))
    options = [option for option in TINY if option not in ("--image-size", "64")]
    assert run(["detect", ENCODER, str(data), "--out", str(tmp_path / "out"), *options, "--epochs", "1"]) == 0
    assert (
        f"images of {median} pixels on the short side, at most {round(median * 1333 / 800)} on the long"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--image-size", "20"], "--image-size 20, --max-size 33: give two patches of 16 px at least"),
        (["--max-size", "50"], "--max-size 50"),
        (["--head-channels", "0"], "--head-channels 0: give 1 or more"),
        (["--pictures", "-1"], "--pictures -1: give 0 or more"),
    ],
)
def test_bad_options_are_one_line_before_anything_is_written(options, named, rectangles, tmp_path, capsys):
    assert run(["detect", ENCODER, str(rectangles()), "--out", str(tmp_path / "out"), *TINY, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("check ")]
    assert len(lines) == 1
    assert named in lines[0]
    assert not (tmp_path / "out").exists()


def test_bad_data_is_one_line_before_training_starts(rectangles, tmp_path, capsys):
    data = rectangles(lambda content: content["annotations"][4].update(category_id=77))
    assert run(["detect", ENCODER, str(data), "--out", str(tmp_path / "out"), *TINY]) == 2
    assert "annotation 5: there is no category 77" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_no_folder_for_the_run_is_told_before_the_data_are_read(tmp_path, capsys):
    assert run(["detect", ENCODER, str(tmp_path), *TINY]) == 2
    assert "--out DIR" in capsys.readouterr().err

"""`fastmae detect`, as a user calls it."""

import json
import statistics

import pytest
import timm
import torch
from PIL import Image

from fastmae.cli import run
from fastmae.evaluate.detection.average_precision import METRICS
from fastmae.runs.encoder import open_encoder

ENCODER = "timm/vit_tiny_patch16_224"
TINY = ["--no-pretrained", "--device", "cpu", "--workers", "0", "--head-channels", "16", "--batch-size", "2"]
TINY += ["--epochs", "2", "--eval-every", "2", "--log-every", "1", "--pictures", "2"]
SMALL_IMAGES = ["--image-size", "64"]
MIXED_PRECISION = ["--checkpoint-activations", "--precision", "bf16-mixed"]


@pytest.mark.slow
def test_a_run_reports_all_figures_draws_a_picture_and_can_be_opened(rectangles, tmp_path, capsys):
    data, out = rectangles(), tmp_path / "out"
    command = ["detect", ENCODER, str(data), "--out", str(out), *TINY, *SMALL_IMAGES, "--json"]
    assert run(command) == 0
    printed, messages = capsys.readouterr()
    assert len(printed.splitlines()) == 1
    result = json.loads(printed)
    assert set(METRICS) <= set(result)
    for name in ("box_ap", "box_ap_50", "box_ap_75", "mask_ap", "mask_ap_50", "mask_ap_75"):
        assert 0 <= result[name] <= 100
    assert result["box_ap_large"] is None  # no object is large
    assert "box_ap_medium, box_ap_large" in messages
    assert (result["epochs"], result["steps"]) == (2, 4)
    with Image.open(out / "detections.png") as picture:
        assert picture.width > 500
    described = json.loads((out / "run.json").read_text())
    assert described["classes"] == [{"id": 3, "name": "red"}, {"id": 8, "name": "blue"}]
    assert described["limits"] == {"image_size": 64, "max_size": 107}
    assert open_encoder(str(out)).patch_size == 16

    assert run(command) == 0  # the run is finished, so its result is only reported again
    assert json.loads(capsys.readouterr().out) == result
    assert run([*command, "--head-channels", "8"]) == 2
    assert "--head-channels 16" in capsys.readouterr().err


@pytest.mark.slow
def test_data_and_losses_are_logged_and_mixed_precision_trains_too(rectangles, tmp_path, capsys):
    data, out = rectangles(lambda content: content["annotations"][0].update(bbox=[5, 5, 0, 9])), tmp_path / "out"
    options = [*TINY, *SMALL_IMAGES, "--epochs", "1", *MIXED_PRECISION]
    assert run(["detect", ENCODER, str(data), "--out", str(out), *options]) == 0
    messages = capsys.readouterr().out
    for fact in ("4 images, 7 objects of 2 classes, 0 crowds; 1 dropped", "64 px on the short side, at most 107 px"):
        assert fact in messages
    entry = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    losses = [entry[f"loss_{name}"] for name in ("classifier", "box_reg", "mask", "objectness", "rpn_box_reg")]
    assert entry["loss"] == pytest.approx(sum(losses), rel=1e-4)


def test_small_images_are_trained_on_at_their_median_size(rectangles, tmp_path, capsys):
    data, out = rectangles(), tmp_path / "out"
    images = json.loads((data / "my_train" / "annotations.json").read_text())["images"]
    median = int(statistics.median(min(image["width"], image["height"]) for image in images))
    assert run(["detect", ENCODER, str(data), "--out", str(out), *TINY, "--epochs", "1"]) == 0
    described = json.loads((out / "run.json").read_text())
    assert described["limits"] == {"image_size": median, "max_size": round(median * 1333 / 800)}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--image-size", "20"], "--image-size 20, --max-size 33"),
        (["--image-size", "64", "--max-size", "50"], "--max-size 50"),
    ],
)
def test_impossible_sizes_end_in_one_line_before_anything_is_written(options, problem, rectangles, tmp_path, capsys):
    assert run(["detect", ENCODER, str(rectangles()), "--out", str(tmp_path / "out"), *TINY, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("check ")]
    assert len(lines) == 1
    assert problem in lines[0]
    assert not (tmp_path / "out").exists()


def test_bad_data_end_the_command_before_anything_is_written(rectangles, tmp_path, capsys):
    data = rectangles(lambda content: content["annotations"][4].update(category_id=77))
    assert run(["detect", ENCODER, str(data), "--out", str(tmp_path / "out"), *TINY]) == 2
    assert "annotation 5: there is no category 77" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_without_out_the_command_is_refused_before_the_data_are_read(tmp_path, capsys):
    assert run(["detect", ENCODER, str(tmp_path), *TINY]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_network_with_maps_of_four_strides_gets_an_fpn(rectangles, tmp_path, capsys):
    out = tmp_path / "out"
    options = [*TINY, *SMALL_IMAGES, "--epochs", "1"]
    assert run(["detect", "timm/resnet10t", str(rectangles()), "--out", str(out), *options]) == 0
    assert "maps of strides 4, 8, 16, 32" in capsys.readouterr().out
    before = timm.create_model("resnet10t").state_dict()["layer1.0.bn1.running_var"]
    encoder = open_encoder(str(out)).network
    assert torch.equal(encoder.layer1[0].bn1.running_var, before)  # batch norms keep their statistics
    assert not encoder.training


def test_a_network_without_such_maps_is_refused(rectangles, tmp_path, error_line):
    line = error_line(["detect", "timm/levit_128", str(rectangles()), "--out", str(tmp_path / "out"), *TINY])
    assert "timm/levit_128" in line

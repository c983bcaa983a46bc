"""The export command: its output, its checks, other image sizes, channels, encoders and classifiers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
import transformers
from timm.data import create_transform, resolve_model_data_config

import fastmae
from fastmae.cli import run
from fastmae.evaluate.transforms import centre_crop
from fastmae.exporting import export as export_command
from fastmae.images.middle import resize_and_crop, to_tensor
from fastmae.images.views import normalise
from fastmae.runs.encoder import open_encoder

CLOSE = {"rtol": 0, "atol": 1e-4}


def test_json_names_the_files_and_the_largest_difference(tiny_run, tmp_path, capsys):
    assert run(["export", str(tiny_run), str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["format"] == "timm"
    assert {Path(file).name for file in result["files"]} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "fastmae.json",
    }
    assert all(Path(file).is_file() for file in result["files"])
    assert result["max_difference"] < 1e-4
    assert (result["image_size"], result["patch_size"], result["dim"], result["classes"]) == (64, 16, 64, 0)


def test_printed_code_runs_as_it_stands(tiny_run, tmp_path, images, tokens, capsys):
    assert run(["export", str(tiny_run), str(tmp_path / "out")]) == 0
    variables = {"images": images}
    with torch.inference_mode():
        exec(capsys.readouterr().out.split("\n\n", 1)[1], variables)
    torch.testing.assert_close(variables["features"], tokens[:, 1:].mean(1), **CLOSE)


@pytest.mark.slow
def test_another_image_size_resamples_the_position_embeddings(tiny_run, tmp_path):
    larger = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = fastmae.load_encoder(tiny_run, image_size=96).forward_features(larger)
    for name in ("timm", "transformers", "onnx"):
        assert run(["export", str(tiny_run), str(tmp_path / name), "--image-size", "96", "--format", name]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    with torch.inference_mode():
        by_timm = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval().forward_features(larger)
        by_transformers = transformers.ViTModel.from_pretrained(tmp_path / "transformers")(larger).last_hidden_state
    torch.testing.assert_close(by_timm, expected, **CLOSE)
    torch.testing.assert_close(by_transformers, expected, **CLOSE)
    np.testing.assert_allclose(session.run(["patch_tokens"], {"images": larger.numpy()})[0], expected[:, 1:], **CLOSE)


@pytest.mark.slow
def test_an_encoder_with_rotary_positions_exports_to_timm_and_onnx_only(vit_store, tiny_student, tmp_path, capsys):
    rotary_run = tmp_path / "rotary"
    student = [*tiny_student, "--encoder", "vit_small_patch16_dinov3"]
    assert run(["pretrain", str(vit_store), str(rotary_run), *student, "--epochs", "1", "--workers", "0"]) == 0
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = fastmae.load_encoder(rotary_run).forward_features(images)

    assert run(["export", str(rotary_run), str(tmp_path / "timm")]) == 0
    with torch.inference_mode():
        by_timm = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval().forward_features(images)
    torch.testing.assert_close(by_timm, expected, **CLOSE)

    assert run(["export", str(rotary_run), str(tmp_path / "onnx"), "--format", "onnx"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    patches, class_token = session.run(["patch_tokens", "class_token"], {"images": images.numpy()})
    prefix = 1 + 4  # class token and registers
    np.testing.assert_allclose(patches, expected[:, prefix:], **CLOSE)
    np.testing.assert_allclose(class_token, expected[:, 0], **CLOSE)

    capsys.readouterr()
    assert run(["export", str(rotary_run), str(tmp_path / "hf"), "--format", "transformers"]) == 2
    error = capsys.readouterr().err
    assert "--format transformers" in error
    assert "rotary positions" in error
    assert not (tmp_path / "hf").exists()


def test_an_encoder_of_grey_images_keeps_channels_normalisation_and_crop(
    photos, picture, vit_weights, tiny_student, tmp_path, run_card, caplog
):
    store, grey_run = tmp_path / "grey.tokens", tmp_path / "run"
    teacher = ["--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", str(vit_weights)]
    sizes = ["--middle-size", "64", "--channels", "1", "--resize", "center-crop", "--workers", "0"]
    assert run(["tokenize", str(photos / "val"), str(store), *teacher, *sizes]) == 0
    assert run(["pretrain", str(store), str(grey_run), *tiny_student, "--epochs", "1", "--workers", "0"]) == 0
    images = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(5))
    opened = open_encoder(str(grey_run))
    with torch.inference_mode():
        expected = opened.network.forward_features(images)[:, 1:].mean(1)
    for name in ("timm", "transformers"):
        assert run(["export", str(grey_run), str(tmp_path / name), "--format", name]) == 0
        caplog.clear()
        torch.testing.assert_close(run_card(tmp_path / name, images)["features"], expected, **CLOSE)
        assert "channels" not in caplog.text  # no warning of the library's about the number of channels
        assert f"{opened.mean[0]:.4g}" in (tmp_path / name / "README.md").read_text()

    assert open_encoder(str(tmp_path / "timm")).resize == opened.resize == "center-crop"
    cfg = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["input_size"], tuple(cfg["mean"]), tuple(cfg["std"])) == ([1, 64, 64], opened.mean, opened.std)
    assert cfg["crop_mode"] == "center"

    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "transformers")
    grey = picture.convert("L")
    by_transformers = processor(grey, return_tensors="pt")["pixel_values"][0]
    expected = normalise(to_tensor(resize_and_crop(grey, 64)), opened.mean, opened.std)
    assert (expected - by_transformers).abs().max() < 4 / 255 / opened.std[0]


@pytest.mark.slow
def test_a_fine_tuned_run_exports_its_encoder_and_its_classifier(tiny_run, photos, picture, tmp_path, capsys):
    tuned = tmp_path / "tuned"
    short = ["--epochs", "1", "--batch-size", "8", "--workers", "0", "--device", "cpu", "--augment", "none"]
    assert run(["finetune", str(tiny_run), str(photos), "--out", str(tuned), *short]) == 0
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    description = json.loads((tuned / "run.json").read_text())["encoder"]
    reference = timm.create_model(description["architecture"], **description["arguments"])
    reference.load_state_dict(torch.load(tuned / "checkpoint.pt", weights_only=True)["model"])
    with torch.inference_mode():
        logits = reference.eval()(images)
        features = reference.forward_head(reference.forward_features(images), pre_logits=True)

    assert run(["export", str(tuned), str(tmp_path / "encoder")]) == 0
    encoder = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    assert encoder.num_classes == 0
    assert run(["export", str(tuned), str(tmp_path / "classifier"), "--classifier"]) == 0
    classifier = timm.create_model(f"local-dir:{tmp_path / 'classifier'}", pretrained=True).eval()
    assert list(classifier.pretrained_cfg["label_names"]) == ["china", "flower"]
    assert run(["export", str(tuned), str(tmp_path / "onnx"), "--classifier", "--format", "onnx"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images), features, **CLOSE)
        torch.testing.assert_close(classifier(images), logits, **CLOSE)
    np.testing.assert_allclose(session.run(["logits"], {"images": images.numpy()})[0], logits, **CLOSE)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["china", "flower"]

    card = (tmp_path / "classifier" / "README.md").read_text()
    assert "| top1 |" in card
    assert json.loads((tiny_run / "run.json").read_text())["store"]["teachers"][0]["weights_sha256"] in card
    by_timm = create_transform(**resolve_model_data_config(classifier))(picture)
    torch.testing.assert_close(by_timm, centre_crop(open_encoder(str(tuned)))(picture), rtol=0, atol=4 / 255 / 0.224)
    assert open_encoder(str(tmp_path / "classifier")).network.num_classes == 0

    capsys.readouterr()
    assert run(["export", str(tiny_run), str(tmp_path / "no"), "--classifier"]) == 2
    assert "--classifier" in capsys.readouterr().err


def test_weights_that_change_on_the_way_fail_the_check_and_leave_nothing(tiny_run, tmp_path, monkeypatch):
    timm_format = export_command.FORMATS["timm"]

    def write_wrongly(model, folder, config):
        timm_format.write(model, folder, config)
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        weights["blocks.1.mlp.fc2.bias"][3] += 0.01
        safetensors.torch.save_file(weights, folder / "model.safetensors")

    monkeypatch.setitem(export_command.FORMATS, "timm", replace(timm_format, write=write_wrongly))
    assert run(["export", str(tiny_run), str(tmp_path / "out")]) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["no-such-run"], "no-such-run"),
        (["timm/pit_ti_224", "--no-pretrained"], "timm/pit_ti_224"),
        (["timm/test_vit", "--no-pretrained", "--image-size", "50"], "--image-size 50"),
        (["timm/test_vit", "--no-pretrained", "--format", "tflite"], "tflite"),
    ],
)
def test_a_model_that_can_not_be_exported_gives_one_line_and_no_files(args, named, tmp_path, capsys):
    assert run(["export", args[0], str(tmp_path / "out"), *args[1:]]) == 2
    error = capsys.readouterr().err
    assert named in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())

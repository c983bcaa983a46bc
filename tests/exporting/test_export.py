"""A run made by the real commands, exported, and loaded by the other library: the same features, by the lines that the card gives."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
import transformers
import yaml
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import fastmae
from fastmae.cli import run
from fastmae.evaluate.transforms import middle_crop
from fastmae.exporting import export as command
from fastmae.images.middle import resize_and_crop, resize_whole, to_tensor
from fastmae.images.views import normalise
from fastmae.runs.encoder import open_encoder

CLOSE = {"rtol": 0, "atol": 1e-4}


def result(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def tiny_run(vit_store, tiny_student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert run(["pretrain", str(vit_store), str(folder), *tiny_student, "--epochs", "2", "--workers", "0"]) == 0
    return folder


@pytest.fixture(scope="module")
def rotary_run(vit_store, tiny_student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "rotary"
    student = [*tiny_student, "--encoder", "vit_small_patch16_dinov3"]
    assert run(["pretrain", str(vit_store), str(folder), *student, "--epochs", "1", "--workers", "0"]) == 0
    return folder


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    """Format -> the folder that the command wrote."""
    parent = tmp_path_factory.mktemp("exported")
    for name in ("timm", "transformers", "onnx"):
        assert run(["export", str(tiny_run), str(parent / name), "--format", name]) == 0
    return {name: parent / name for name in ("timm", "transformers", "onnx")}


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokens(tiny_run, images):
    """What the run's encoder makes of the images: [3, 1 + 16, 64]."""
    with torch.inference_mode():
        return fastmae.load_encoder(tiny_run).forward_features(images)


def a_picture(photos):
    return Image.open(photos / "train" / "china" / "00.jpg").convert("RGB")


def lines_of_card(folder, images):
    """What the card's Python leaves behind, run in the folder."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    names = {"images": images}
    with torch.inference_mode():
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
    return names


def test_the_json_names_the_files_and_the_difference(tiny_run, tmp_path, capsys):
    assert run(["export", str(tiny_run), str(tmp_path / "out"), "--json"]) == 0
    found = result(capsys)
    assert found["format"] == "timm"
    assert {Path(file).name for file in found["files"]} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "fastmae.json",
    }
    assert all(Path(file).is_file() for file in found["files"])
    assert found["max_difference"] < 1e-4
    assert (found["image_size"], found["patch_size"], found["dim"], found["classes"]) == (64, 16, 64, 0)


def test_timm_loads_it_in_each_of_its_ways(exported, images, tokens):
    out = exported["timm"]
    config = json.loads((out / "config.json").read_text())
    name, arguments = config["architecture"], config["model_args"]
    plain = timm.create_model(name, **arguments)
    plain.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"), strict=True)
    overlay = {"file": str(out / "model.safetensors")}
    by_name = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    by_folder = timm.create_model(f"local-dir:{out}", pretrained=True)
    for model in (plain, by_name, by_folder):
        with torch.inference_mode():
            torch.testing.assert_close(model.eval().forward_features(images), tokens, **CLOSE)
            torch.testing.assert_close(model(images), tokens[:, 1:].mean(1), **CLOSE)
    assert timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=7)(images).shape == (3, 7)


def test_timm_prepares_pictures_as_the_run_saw_them(exported, tiny_run, photos):
    model = timm.create_model(f"local-dir:{exported['timm']}", pretrained=True)
    store = json.loads((tiny_run / "run.json").read_text())["store"]
    mean, std = store["normalisation"]
    assert (list(model.pretrained_cfg["mean"]), list(model.pretrained_cfg["std"])) == (mean, std)
    picture = a_picture(photos)
    ours = normalise(to_tensor(resize_whole(picture, 64)), mean, std)
    torch.testing.assert_close(create_transform(**resolve_model_data_config(model))(picture), ours, **CLOSE)


def test_fastmae_opens_what_it_exported(exported, tiny_run, images, tokens):
    for spec in (exported["timm"], exported["timm"] / "model.safetensors"):
        opened, own = open_encoder(str(spec)), open_encoder(str(tiny_run))
        with torch.inference_mode():
            torch.testing.assert_close(opened.network.forward_features(images), tokens, **CLOSE)
        assert replace(opened, network=None, source="") == replace(own, network=None, source="")


def test_transformers_loads_it(exported, images, tokens, capfd):
    out = exported["transformers"]
    transformers.utils.logging.disable_progress_bar()
    model, loading = transformers.ViTModel.from_pretrained(out, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "LOAD REPORT" not in capfd.readouterr().err
    without_pooler = transformers.ViTModel.from_pretrained(out, add_pooling_layer=False)
    assert type(transformers.AutoModel.from_pretrained(out)) is transformers.ViTModel
    for each in (model, without_pooler):
        with torch.inference_mode():
            torch.testing.assert_close(each.eval()(images).last_hidden_state, tokens, **CLOSE)
    with torch.inference_mode():
        torch.testing.assert_close(model(images).pooler_output, tokens[:, 0], **CLOSE)


def test_transformers_prepares_pictures_as_the_run_saw_them(exported, tiny_run, photos):
    processor = transformers.AutoImageProcessor.from_pretrained(exported["transformers"])
    mean, std = json.loads((tiny_run / "run.json").read_text())["store"]["normalisation"]
    picture = a_picture(photos)
    ours = normalise(to_tensor(resize_whole(picture, 64)), mean, std)
    theirs = processor(picture, return_tensors="pt")["pixel_values"][0]
    assert (ours - theirs).abs().max() < 4 / 255 / min(std)  # its bicubic rounds otherwise


def test_onnxruntime_gives_the_same_for_any_batch(exported, images, tokens):
    session = onnxruntime.InferenceSession(exported["onnx"] / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["embedding", "patch_tokens", "class_token"]
    for batch in (1, 2, 3):
        embedding, patches, class_token = session.run(None, {"images": images[:batch].numpy()})
        np.testing.assert_allclose(embedding, tokens[:batch, 1:].mean(1), **CLOSE)
        np.testing.assert_allclose(patches, tokens[:batch, 1:], **CLOSE)
        np.testing.assert_allclose(class_token, tokens[:batch, 0], **CLOSE)
    about = session.get_modelmeta().custom_metadata_map
    assert (json.loads(about["image_size"]), json.loads(about["patch_size"]), about["crop"]) == (64, 16, "whole")
    assert len(json.loads(about["mean"])) == len(json.loads(about["std"])) == 3


def test_the_cards_lines_run_as_they_stand(exported, images, tokens, monkeypatch):
    transformers.utils.logging.disable_progress_bar()
    expected = tokens[:, 1:].mean(1)
    for name, given in {"timm": images, "transformers": images, "onnx": images.numpy()}.items():
        monkeypatch.chdir(exported[name])
        left = lines_of_card(exported[name], given)
        np.testing.assert_allclose(left["embedding" if name == "onnx" else "features"], expected, **CLOSE)


def test_the_printed_lines_run_as_they_stand(tiny_run, tmp_path, images, tokens, capsys):
    assert run(["export", str(tiny_run), str(tmp_path / "out")]) == 0
    names = {"images": images}
    with torch.inference_mode():
        exec(capsys.readouterr().out.split("\n\n", 1)[1], names)
    torch.testing.assert_close(names["features"], tokens[:, 1:].mean(1), **CLOSE)


def test_the_card_says_where_the_weights_come_from(exported, tiny_run):
    described = json.loads((tiny_run / "run.json").read_text())
    last = json.loads((tiny_run / "metrics.jsonl").read_text().splitlines()[-1])
    for name, folder in exported.items():
        card = (folder / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(card.split("---\n")[1])
        assert front["library_name"] == name
        assert front["pipeline_tag"] == "image-feature-extraction"
        assert "fastmae" in front["tags"]
        store = described["store"]
        for fact in (
            store["images_sha256"],
            store["teachers"][0]["spec"],
            store["teachers"][0]["weights_sha256"],
            f"| loss | {last['loss']:.4g} |",
            "| steps | 8 |",
            "| epochs | 2 |",
            f"fastmae {fastmae.__version__}",
            "yours to check",
        ):
            assert fact in card.replace("\n", " ")
        assert str(tiny_run.parent) not in card
        assert str(tiny_run.parents[1]) not in (folder / "fastmae.json").read_text().replace(
            f'"source": "{tiny_run}"', ""
        )


def test_another_image_size_has_resampled_positions(tiny_run, tmp_path):
    larger = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = fastmae.load_encoder(tiny_run, image_size=96).forward_features(larger)
    assert run(["export", str(tiny_run), str(tmp_path / "timm"), "--image-size", "96"]) == 0
    assert run(["export", str(tiny_run), str(tmp_path / "hf"), "--image-size", "96", "--format", "transformers"]) == 0
    assert run(["export", str(tiny_run), str(tmp_path / "onnx"), "--image-size", "96", "--format", "onnx"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    with torch.inference_mode():
        by_timm = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval().forward_features(larger)
        by_transformers = transformers.ViTModel.from_pretrained(tmp_path / "hf")(larger).last_hidden_state
    torch.testing.assert_close(by_timm, expected, **CLOSE)
    torch.testing.assert_close(by_transformers, expected, **CLOSE)
    np.testing.assert_allclose(session.run(["patch_tokens"], {"images": larger.numpy()})[0], expected[:, 1:], **CLOSE)


def test_a_run_with_rotary_positions_goes_to_timm_and_onnx(rotary_run, tmp_path, capsys):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = fastmae.load_encoder(rotary_run).forward_features(images)
    assert run(["export", str(rotary_run), str(tmp_path / "timm")]) == 0
    assert run(["export", str(rotary_run), str(tmp_path / "onnx"), "--format", "onnx"]) == 0
    with torch.inference_mode():
        by_timm = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval().forward_features(images)
    torch.testing.assert_close(by_timm, expected, **CLOSE)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    patches, class_token = session.run(["patch_tokens", "class_token"], {"images": images.numpy()})
    np.testing.assert_allclose(patches, expected[:, 5:], **CLOSE)  # behind the class token and four registers
    np.testing.assert_allclose(class_token, expected[:, 0], **CLOSE)
    capsys.readouterr()
    assert run(["export", str(rotary_run), str(tmp_path / "hf"), "--format", "transformers"]) == 2
    assert (
        "has rotary positions, which transformers' ViT has not; take --format timm or onnx" in capsys.readouterr().err
    )
    assert not (tmp_path / "hf").exists()


def test_an_encoder_of_grey_images(photos, vit_weights, tiny_student, tmp_path, monkeypatch, caplog):
    store, tiny = tmp_path / "grey.tokens", tmp_path / "run"
    teacher = ["--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", str(vit_weights)]
    sizes = ["--middle-size", "64", "--channels", "1", "--resize", "center-crop", "--workers", "0"]
    assert run(["tokenize", str(photos / "val"), str(store), *teacher, *sizes]) == 0
    assert run(["pretrain", str(store), str(tiny), *tiny_student, "--epochs", "1", "--workers", "0"]) == 0
    images = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(5))
    opened = open_encoder(str(tiny))
    with torch.inference_mode():
        expected = opened.network.forward_features(images)[:, 1:].mean(1)
    for name in ("timm", "transformers"):
        assert run(["export", str(tiny), str(tmp_path / name), "--format", name]) == 0
        monkeypatch.chdir(tmp_path / name)
        caplog.clear()
        torch.testing.assert_close(lines_of_card(tmp_path / name, images)["features"], expected, **CLOSE)
        assert "channels" not in caplog.text
        assert f"{opened.mean[0]:.4g}" in (tmp_path / name / "README.md").read_text()
    assert open_encoder(str(tmp_path / "timm")).resize == opened.resize == "center-crop"
    cfg = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["input_size"], tuple(cfg["mean"]), tuple(cfg["std"])) == ([1, 64, 64], opened.mean, opened.std)
    assert cfg["crop_mode"] == "center"
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "transformers")
    picture = a_picture(photos).convert("L")
    theirs = processor(picture, return_tensors="pt")["pixel_values"][0]
    ours = normalise(to_tensor(resize_and_crop(picture, 64)), opened.mean, opened.std)
    assert (ours - theirs).abs().max() < 4 / 255 / opened.std[0]


@pytest.mark.parametrize(
    ("name", "lacking"), [("test_vit2", "register tokens"), ("vit_base_patch32_clip_224", "a norm before the blocks")]
)
def test_what_transformers_vit_has_not_is_named(name, lacking, tmp_path, capsys):
    args = ["export", f"timm/{name}", str(tmp_path / "out"), "--no-pretrained", "--format", "transformers"]
    assert run(args) == 2
    assert lacking in capsys.readouterr().err.splitlines()[-1]


def test_a_fine_tuned_run_exports_its_encoder_and_its_classifier(tiny_run, photos, tmp_path, capsys):
    tuned = tmp_path / "tuned"
    few = ["--epochs", "1", "--batch-size", "8", "--workers", "0", "--device", "cpu", "--augment", "none"]
    assert run(["finetune", str(tiny_run), str(photos), "--out", str(tuned), *few]) == 0
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
    picture = a_picture(photos)
    theirs = create_transform(**resolve_model_data_config(classifier))(picture)
    torch.testing.assert_close(theirs, middle_crop(open_encoder(str(tuned)))(picture), rtol=0, atol=4 / 255 / 0.224)
    assert open_encoder(str(tmp_path / "classifier")).network.num_classes == 0

    capsys.readouterr()
    assert run(["export", str(tiny_run), str(tmp_path / "no"), "--classifier"]) == 2
    assert "is no run of `fastmae finetune`" in capsys.readouterr().err


def test_an_earlier_export_of_the_same_is_replaced_and_what_else_lies_there_stays(tiny_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["export", str(tiny_run), str(out)]) == 0
    (out / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert run(["export", str(tiny_run), str(out), "--image-size", "96"]) == 0
    assert json.loads((out / "config.json").read_text())["model_args"]["img_size"] == 96
    assert (out / ".gitattributes").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    capsys.readouterr()
    assert run(["export", str(tiny_run), str(out), "--format", "onnx"]) == 2
    assert "holds another export (format: timm, not onnx); give another folder" in capsys.readouterr().err


def test_a_place_that_is_taken_is_left_alone(tiny_run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert run(["export", str(tiny_run), str(tmp_path / "out")]) == 2
    assert "exists and is not an export; give a folder that is new or empty" in capsys.readouterr().err
    assert run(["export", str(tiny_run), str(tmp_path / "out" / "thesis.txt")]) == 2
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert run(["export", str(tiny_run), str(tmp_path / "empty")]) == 0


def test_weights_that_come_back_otherwise_are_a_failed_check(tiny_run, tmp_path, capsys, monkeypatch):
    def write_wrongly(model, folder, config):
        write(model, folder, config)
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        weights["blocks.1.mlp.fc2.bias"][3] += 0.01
        safetensors.torch.save_file(weights, folder / "model.safetensors")

    write = command.FORMATS["timm"].write
    monkeypatch.setitem(command.FORMATS, "timm", replace(command.FORMATS["timm"], write=write_wrongly))
    assert run(["export", str(tiny_run), str(tmp_path / "out")]) == 1
    assert "gives another" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["no-such-run"], "no such run"),
        (["timm/resnet18", "--no-pretrained"], "not a plain ViT"),
        (["timm/test_vit", "--no-pretrained", "--image-size", "50"], "not a multiple of the patch"),
        (["timm/test_vit", "--no-pretrained", "--format", "onnx", "--opset", "9"], "--opset 9"),
        (["timm/test_vit", "--no-pretrained", "--format", "tflite"], "tflite"),
    ],
)
def test_what_can_not_be_exported_is_one_line(args, says, tmp_path, capsys):
    assert run(["export", args[0], str(tmp_path / "out"), *args[1:]]) == 2
    err = capsys.readouterr().err
    assert says in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_weights_of_gigabytes_lie_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr("fastmae.exporting.onnx_format.LARGEST_FILE", 1 << 10)
    assert (
        run(
            [
                "export",
                "timm/test_vit2",
                str(tmp_path / "out"),
                "--no-pretrained",
                "--format",
                "onnx",
                "--image-size",
                "32",
            ]
        )
        == 0
    )
    assert (
        (tmp_path / "out" / "model.onnx").stat().st_size < 1e6 < (tmp_path / "out" / "model.onnx.data").stat().st_size
    )
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    embedding, patches = session.run(None, {"images": np.zeros((2, 3, 32, 32), np.float32)})  # it has no class token
    assert (embedding.shape, patches.shape) == ((2, 64), (2, 4, 64))

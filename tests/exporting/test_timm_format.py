"""An export for timm, loaded and used by timm."""

import json
from dataclasses import replace

import safetensors.torch
import timm
import torch
from timm.data import create_transform, resolve_model_data_config

from fastmae.images.middle import resize_whole, to_tensor
from fastmae.images.views import normalise
from fastmae.runs.encoder import open_encoder

CLOSE = {"rtol": 0, "atol": 1e-4}


def test_timm_loads_the_export_by_folder_by_name_and_from_its_weights(exports, images, tokens):
    out = exports["timm"]
    config = json.loads((out / "config.json").read_text())
    name, arguments = config["architecture"], config["model_args"]
    with_weights = timm.create_model(name, **arguments)
    with_weights.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"), strict=True)
    overlay = {"file": str(out / "model.safetensors"), "custom_load": False}
    by_name = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    by_folder = timm.create_model(f"local-dir:{out}", pretrained=True)
    for model in (with_weights, by_name, by_folder):
        with torch.inference_mode():
            torch.testing.assert_close(model.eval().forward_features(images), tokens, **CLOSE)
            torch.testing.assert_close(model(images), tokens[:, 1:].mean(1), **CLOSE)
    assert timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=7)(images).shape == (3, 7)


def test_timm_prepares_pictures_as_in_pre_training(exports, tiny_run, picture):
    model = timm.create_model(f"local-dir:{exports['timm']}", pretrained=True)
    mean, std = json.loads((tiny_run / "run.json").read_text())["store"]["normalisation"]
    assert (list(model.pretrained_cfg["mean"]), list(model.pretrained_cfg["std"])) == (mean, std)
    expected = normalise(to_tensor(resize_whole(picture, 64)), mean, std)
    torch.testing.assert_close(create_transform(**resolve_model_data_config(model))(picture), expected, **CLOSE)


def test_fastmae_opens_its_own_export_as_the_same_encoder(exports, tiny_run, images, tokens):
    original = open_encoder(str(tiny_run))
    for spec in (exports["timm"], exports["timm"] / "model.safetensors"):
        opened = open_encoder(str(spec))
        with torch.inference_mode():
            torch.testing.assert_close(opened.network.forward_features(images), tokens, **CLOSE)
        assert replace(opened, network=None, source="") == replace(original, network=None, source="")

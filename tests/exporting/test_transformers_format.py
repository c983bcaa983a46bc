"""An export for transformers, loaded and used by transformers."""

import json

import pytest
import torch
import transformers

from fastmae.cli import run
from fastmae.images.middle import resize_whole, to_tensor
from fastmae.images.views import normalise

CLOSE = {"rtol": 0, "atol": 1e-4}


def test_transformers_loads_the_export_with_and_without_its_pooler(exports, images, tokens, capfd):
    out = exports["transformers"]
    transformers.utils.logging.disable_progress_bar()
    model, loading = transformers.ViTModel.from_pretrained(out, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "LOAD REPORT" not in capfd.readouterr().err
    without_pooler = transformers.ViTModel.from_pretrained(out, add_pooling_layer=False)
    assert type(transformers.AutoModel.from_pretrained(out)) is transformers.ViTModel
    for loaded in (model, without_pooler):
        with torch.inference_mode():
            torch.testing.assert_close(loaded.eval()(images).last_hidden_state, tokens, **CLOSE)
    with torch.inference_mode():
        torch.testing.assert_close(model(images).pooler_output, tokens[:, 0], **CLOSE)


def test_transformers_prepares_pictures_as_in_pre_training(exports, tiny_run, picture):
    processor = transformers.AutoImageProcessor.from_pretrained(exports["transformers"])
    mean, std = json.loads((tiny_run / "run.json").read_text())["store"]["normalisation"]
    expected = normalise(to_tensor(resize_whole(picture, 64)), mean, std)
    by_transformers = processor(picture, return_tensors="pt")["pixel_values"][0]
    # Its bicubic resampling rounds differently, by a few grey levels.
    assert (expected - by_transformers).abs().max() < 4 / 255 / min(std)


@pytest.mark.parametrize(
    ("name", "misfit"), [("test_vit2", "register tokens"), ("vit_base_patch32_clip_224", "a norm before the blocks")]
)
def test_the_error_names_what_transformers_vit_does_not_support(name, misfit, tmp_path, capsys):
    args = ["export", f"timm/{name}", str(tmp_path / "out"), "--no-pretrained", "--format", "transformers"]
    assert run(args) == 2
    assert misfit in capsys.readouterr().err.splitlines()[-1]

"""An ONNX export, run by onnxruntime."""

import json

import numpy as np
import onnxruntime
import pytest

from fastmae.cli import run

CLOSE = {"rtol": 0, "atol": 1e-4}


def test_onnxruntime_computes_the_same_outputs_for_any_batch_size(exports, images, tokens):
    session = onnxruntime.InferenceSession(exports["onnx"] / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["embedding", "patch_tokens", "class_token"]
    for batch in (1, 2, 3):
        embedding, patches, class_token = session.run(None, {"images": images[:batch].numpy()})
        np.testing.assert_allclose(embedding, tokens[:batch, 1:].mean(1), **CLOSE)
        np.testing.assert_allclose(patches, tokens[:batch, 1:], **CLOSE)
        np.testing.assert_allclose(class_token, tokens[:batch, 0], **CLOSE)


def test_the_graph_holds_how_to_prepare_its_input(exports):
    metadata = onnxruntime.InferenceSession(exports["onnx"] / "model.onnx").get_modelmeta().custom_metadata_map
    sizes = (json.loads(metadata["image_size"]), json.loads(metadata["patch_size"]))
    assert (sizes, metadata["crop"]) == ((64, 16), "whole")
    assert len(json.loads(metadata["mean"])) == len(json.loads(metadata["std"])) == 3


@pytest.mark.slow
def test_large_weights_are_written_to_a_file_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr("fastmae.exporting.onnx_format.MAX_EMBEDDED_BYTES", 1 << 10)
    out = tmp_path / "out"
    args = ["--no-pretrained", "--format", "onnx", "--image-size", "32"]
    assert run(["export", "timm/test_vit2", str(out), *args]) == 0
    assert (out / "model.onnx").stat().st_size < (out / "model.onnx.data").stat().st_size
    session = onnxruntime.InferenceSession(out / "model.onnx")
    embedding, patches = session.run(None, {"images": np.zeros((2, 3, 32, 32), np.float32)})  # it has no class token
    assert (embedding.shape, patches.shape) == ((2, 64), (2, 4, 64))

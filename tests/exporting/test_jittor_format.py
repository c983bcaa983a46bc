"""An export for Jittor: read by its own model.py, in a Python that has Jittor.

Jittor needs numpy < 2, so it lives in an environment of its own. Name its Python in FASTMAE_JITTOR_PYTHON. Its first
import compiles for minutes.
"""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from timm.layers import QuickGELU

from fastmae.errors import InputError
from fastmae.exporting.jittor_format import JITTOR, arguments
from fastmae.runs.encoder import open_encoder

JITTOR_PYTHON = os.environ.get("FASTMAE_JITTOR_PYTHON") or (
    sys.executable if importlib.util.find_spec("jittor") else ""
)
COMPUTE = """
import sys
import jittor
import numpy as np
sys.path.insert(0, ".")
import model
encoder = model.load(".")
images = jittor.array(np.load("images.npy", allow_pickle=False))
np.save("tokens.npy", encoder.tokens(images).numpy())
np.save("features.npy", encoder(images).numpy())
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not JITTOR_PYTHON, reason="no Jittor: FASTMAE_JITTOR_PYTHON names no Python that has it")
def test_jittor_computes_the_same_features(exports, images, tokens):
    folder = exports["jittor"]
    np.save(folder / "images.npy", images.numpy())
    environment = {**os.environ, "nvcc_path": "", "use_mkl": "0"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [JITTOR_PYTHON, "-c", COMPUTE], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    computed = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("tokens", "features")}
    np.testing.assert_allclose(computed["tokens"], tokens, rtol=0, atol=1e-4)
    np.testing.assert_allclose(computed["features"], tokens[:, 1:].mean(1), rtol=0, atol=1e-4)


def test_the_config_says_what_the_weights_are(small_vit):
    network = arguments(small_vit(reg_tokens=2, no_embed_class=True, init_values=0.1, act_layer=QuickGELU))
    assert network == {
        "image_size": 64,
        "patch_size": 16,
        "channels": 3,
        "width": 64,
        "depth": 6,
        "heads": 2,
        "hidden": 192,
        "eps": 1e-6,
        "class_token": True,
        "registers": 2,
        "prefix_positions": False,
        "pool": "token",
        "classes": 0,
        "qkv_bias": True,
        "patch_bias": True,
        "layer_scale": True,
        "quick_gelu": True,
        "pre_norm": False,
        "final_norm": True,
        "pool_norm": False,
    }


def test_the_weights_keep_timms_names(exports, tiny_run):
    weights = safetensors.torch.load_file(exports["jittor"] / "model.safetensors")
    torch.testing.assert_close(weights, dict(open_encoder(str(tiny_run)).network.state_dict()))


def test_what_model_py_can_not_hold_is_named(small_vit, tmp_path, error_line):
    with pytest.raises(InputError, match="pooling of the kind 'max'"):
        JITTOR.check(small_vit(global_pool="max"))
    args = ["export", "timm/test_resnet", str(tmp_path / "out"), "--no-pretrained", "--format", "jittor"]
    assert "no plain ViT" in error_line(args)
    assert not list(tmp_path.iterdir())

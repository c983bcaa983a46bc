"""An export for mmpretrain, whose ViT is written out here: the package needs an older transformers than these tests."""

import ast
import re

import pytest
import torch
import torch.nn.functional as F
from timm.layers import QuickGELU

from fastmae.errors import InputError
from fastmae.exporting.mmpretrain_format import MMPRETRAIN
from fastmae.outside.tensors import read_tensors

CLOSE = {"rtol": 0, "atol": 1e-4}


def tokens_of_mmpretrain(weights, images, heads, eps=1e-6):
    """The computation of mmpretrain's VisionTransformer (raw output); every weight is used once."""
    left = dict(weights)

    def take(name):
        return left.pop(name) if name in left else None

    def affine(name):
        return take(f"{name}.weight"), take(f"{name}.bias")

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], *affine(name), eps)

    projection, bias = affine("patch_embed.projection")
    x = F.conv2d(images, projection, bias, stride=projection.shape[-1]).flatten(2).transpose(1, 2)
    if "cls_token" in left:
        x = torch.cat([take("cls_token").expand(len(x), -1, -1), x], dim=1)
    x = x + take("pos_embed")
    x = norm("pre_norm", x) if "pre_norm.weight" in left else x
    for number in range(1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))):
        layer = f"layers.{number}"
        qkv = F.linear(norm(f"{layer}.ln1", x), *affine(f"{layer}.attn.qkv"))
        query, key, value = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        attended = F.linear(mixed, *affine(f"{layer}.attn.proj"))
        scale1, scale2 = take(f"{layer}.attn.gamma1.weight"), take(f"{layer}.ffn.gamma2.weight")
        x = x + (attended if scale1 is None else attended * scale1)
        hidden = F.gelu(F.linear(norm(f"{layer}.ln2", x), *affine(f"{layer}.ffn.layers.0.0")))
        added = F.linear(hidden, *affine(f"{layer}.ffn.layers.1"))
        x = x + (added if scale2 is None else added * scale2)
    x = norm("ln1", x) if "ln1.weight" in left else x
    assert not left
    return x


def backbone_of(code):
    """The `backbone` of the card's code: the arguments with which mmpretrain builds the network."""
    assigned = next(node for node in ast.parse(code).body if ast.unparse(node).startswith("backbone = "))
    return eval(ast.unparse(assigned.value))


def test_the_file_gives_the_same_features_under_mmpretrains_names(exports, images, tokens):
    card = (exports["mmpretrain"] / "README.md").read_text()
    backbone = backbone_of(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1])
    assert (backbone["img_size"], backbone["patch_size"], backbone["arch"]["embed_dims"]) == (64, 16, 64)
    weights = torch.load(exports["mmpretrain"] / "backbone.pth", weights_only=True)
    with torch.inference_mode():
        computed = tokens_of_mmpretrain(weights, images, backbone["arch"]["num_heads"], backbone["norm_cfg"]["eps"])
    torch.testing.assert_close(computed, tokens, **CLOSE)


@pytest.mark.parametrize(
    ("arguments", "switches"),
    [
        ({}, {}),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, {"with_cls_token": False}),
        ({"pre_norm": True}, {"pre_norm": True}),
        ({"init_values": 0.1}, {"layer_scale_init_value": 1e-5}),
        ({"qkv_bias": False}, {"qkv_bias": False}),
        ({"final_norm": False}, {"final_norm": False}),
    ],
)
def test_the_config_switches_on_what_the_network_has(arguments, switches, small_vit, images, tmp_path):
    model = small_vit(**arguments)
    MMPRETRAIN.check(model)
    MMPRETRAIN.write(model, tmp_path, None)
    backbone = backbone_of(MMPRETRAIN.usage(model, "."))
    optional = ("with_cls_token", "qkv_bias", "pre_norm", "final_norm", "layer_scale_init_value", "patch_cfg")
    assert {key: value for key, value in backbone.items() if key in optional} == switches
    weights = read_tensors(tmp_path / "backbone.pth")
    with torch.inference_mode():
        expected = model.network.forward_features(images)
        computed = tokens_of_mmpretrain(weights, images, backbone["arch"]["num_heads"], backbone["norm_cfg"]["eps"])
    torch.testing.assert_close(computed, expected, **CLOSE)


@pytest.mark.parametrize(
    ("name", "misfit"),
    [
        ("test_vit2", "register tokens"),
        ("test_resnet", "no plain ViT"),
    ],
)
def test_the_error_names_what_mmpretrains_vit_can_not_hold(name, misfit, tmp_path, error_line):
    args = ["export", f"timm/{name}", str(tmp_path / "out"), "--no-pretrained", "--format", "mmpretrain"]
    line = error_line(args)
    assert "--format mmpretrain" in line
    assert misfit in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "misfit"),
    [({"act_layer": QuickGELU}, "approximate GELU"), ({"no_embed_class": True}, "no position embedding")],
)
def test_a_network_of_the_same_weights_that_computes_something_else_is_refused(arguments, misfit, small_vit):
    with pytest.raises(InputError, match=misfit):
        MMPRETRAIN.check(small_vit(**arguments))

"""An export for detectron2, whose ViT is written out here: the package can't be installed from the index."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import RmsNorm

import fastmae
from fastmae.errors import InputError
from fastmae.exporting.detectron2_format import DETECTRON2
from fastmae.exporting.export import largest_difference

CLOSE = {"rtol": 0, "atol": 1e-4}


def last_feat_of_detectron2(weights, images, heads, has_class_position):
    """The computation of detectron2's ViT without windows and relative positions; every weight is used once."""
    left = dict(weights)

    def affine(name):
        return left.pop(f"{name}.weight"), left.pop(f"{name}.bias")

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], *affine(name), eps=1e-6)

    projection, bias = affine("patch_embed.proj")
    x = F.conv2d(images, projection, bias, stride=projection.shape[-1]).permute(0, 2, 3, 1)
    positions = left.pop("pos_embed")[:, int(has_class_position) :]
    x = x + positions.reshape(1, *x.shape[1:])
    batch, rows, cols, width = x.shape
    for number in range(1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))):
        block = f"blocks.{number}"
        qkv = F.linear(norm(f"{block}.norm1", x), *affine(f"{block}.attn.qkv"))
        qkv = qkv.reshape(batch, rows * cols, 3, heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.reshape(3, batch * heads, rows * cols, -1).unbind(0)
        attention = (query * (width // heads) ** -0.5 @ key.transpose(1, 2)).softmax(-1)
        mixed = (attention @ value).view(batch, heads, rows, cols, -1).permute(0, 2, 3, 1, 4).reshape(x.shape)
        x = x + F.linear(mixed, *affine(f"{block}.attn.proj"))
        hidden = F.gelu(F.linear(norm(f"{block}.norm2", x), *affine(f"{block}.mlp.fc1")))
        x = x + F.linear(hidden, *affine(f"{block}.mlp.fc2"))
    assert not left
    return x.permute(0, 3, 1, 2)


def test_the_file_gives_the_last_blocks_features_of_the_patches_alone(exports, tiny_run, images):
    weights = torch.load(exports["detectron2"] / "backbone.pth", weights_only=True)
    encoder = fastmae.load_encoder(tiny_run)
    with torch.inference_mode():
        expected = encoder.blocks(encoder.patch_embed(images) + encoder.pos_embed[:, 1:])
        computed = last_feat_of_detectron2(weights, images, heads=2, has_class_position=True)
    torch.testing.assert_close(computed.flatten(2).transpose(1, 2), expected, **CLOSE)
    card = (exports["detectron2"] / "README.md").read_text()
    assert "embed_dim=64, depth=2, num_heads=2" in card
    assert "pretrain_img_size=64, pretrain_use_cls_token=True" in card
    assert "detectron2 itself was not run" in card


def test_a_network_without_class_token_has_positions_for_its_patches_alone(small_vit, images, tmp_path):
    model = small_vit(class_token=False, global_pool="avg", fc_norm=False)
    DETECTRON2.check(model)
    DETECTRON2.write(model, tmp_path, None)
    assert largest_difference(model, tmp_path, DETECTRON2) < 1e-5
    weights = torch.load(tmp_path / "backbone.pth", weights_only=True)
    with torch.inference_mode():
        expected = model.network.blocks(model.network.patch_embed(images).flatten(1, 2) + model.network.pos_embed)
        computed = last_feat_of_detectron2(weights, images, heads=2, has_class_position=False)
    torch.testing.assert_close(computed.flatten(2).transpose(1, 2), expected, **CLOSE)
    assert "pretrain_use_cls_token=False" in DETECTRON2.usage(model, ".")


@pytest.mark.parametrize(
    ("arguments", "misfit"),
    [
        ({"init_values": 0.1}, "layer scale"),
        ({"pre_norm": True}, "a norm before the blocks"),
        ({"reg_tokens": 2}, "register tokens"),
        ({"norm_layer": RmsNorm}, "norms of another kind"),
    ],
)
def test_what_detectron2s_vit_can_not_hold_is_named(arguments, misfit, small_vit):
    with pytest.raises(InputError, match=misfit):
        DETECTRON2.check(small_vit(**arguments))


def test_a_network_that_does_not_fit_gives_one_line_and_no_files(tmp_path, error_line):
    args = ["export", "timm/test_vit2", str(tmp_path / "out"), "--no-pretrained", "--format", "detectron2"]
    line = error_line(args)
    assert "--format detectron2" in line
    assert "register tokens" in line
    assert not list(tmp_path.iterdir())

"""A random ViT, saved in the layouts of MAE, DINO, iBOT and timm: the loaded teacher gives the ViT's own features."""

import pytest
import timm
import torch

from fastmae.errors import InputError
from fastmae.images.views import IMAGENET_MEAN, IMAGENET_STD
from fastmae.teachers import load_teacher
from fastmae.teachers.checkpoint_file import load_checkpoint_file


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64).eval()
    for parameter in model.parameters():  # biases and norms too, so that a lost one shows
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def as_mae(state):
    """mae_pretrain_vit_*_full: decoder and encoder under 'model'."""
    decoder = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_embed.weight": torch.zeros(8, 192),
        "decoder_blocks.0.norm1.bias": torch.zeros(8),
    }
    return {"model": {**state, **decoder}}


def as_dino(state):
    """A full checkpoint: student and teacher, each with a backbone and a projection head."""
    head = {"head.mlp.0.weight": torch.zeros(8, 192), "head.last_layer.weight_g": torch.zeros(8, 1)}
    teacher = {**{f"backbone.{name}": tensor for name, tensor in state.items()}, **head}
    student = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in teacher.items()}
    return {"student": student, "teacher": teacher, "epoch": 800, "args": None}


def as_ibot(state):
    """The published teacher: the backbone and the embedding of masked patches."""
    return {"state_dict": {**state, "masked_embed": torch.zeros(1, 192)}}


def as_distributed(state):
    return {"model": {f"module.{name}": tensor for name, tensor in state.items()}, "optimizer": {"state": {}}}


@pytest.mark.parametrize("layout", [as_mae, as_dino, as_ibot, as_distributed, dict])
def test_each_layout_gives_the_features_of_the_original(layout, vit, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(layout(vit.state_dict()), path)
    teacher = load_teacher(f"file/{path}", 64, 4)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        expected = vit.forward_features((pixels / 255 - mean) / std)[:, 1:]
    torch.testing.assert_close(teacher(pixels).flatten(1, 2), expected, atol=1e-5, rtol=1e-5)


def test_another_checkpoint_is_refused_with_what_to_give_instead(tmp_path, vit):
    path = tmp_path / "other.pth"
    torch.save(timm.create_model("resnet18").state_dict(), path)
    with pytest.raises(InputError, match="--teacher timm/NAME"):
        load_teacher(f"file/{path}", 64, 4)
    torch.save(timm.create_model("vit_tiny_patch16_224", embed_dim=96, num_heads=3).state_dict(), path)
    with pytest.raises(InputError, match="width 96"):
        load_teacher(f"file/{path}", 64, 4)
    state = vit.state_dict()
    state.pop("blocks.3.norm1.weight")
    torch.save(state, path)
    with pytest.raises(InputError, match=r"blocks\.3\.norm1\.weight"):
        load_teacher(f"file/{path}", 64, 4)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "student.encoder.backbone."]
)
def test_prefixes_of_wrappers_are_no_part_of_the_names(prefix, vit, tmp_path):
    state = {f"{prefix}{name}": tensor for name, tensor in vit.state_dict().items()}
    other = {"criterion.weight": torch.ones(3), "best_loss": torch.tensor(torch.inf)}
    torch.save({"state_dict": state | other, "best_acc1": torch.tensor(71.0), "epoch": 3}, tmp_path / "a.ckpt")
    model, _ = load_checkpoint_file(tmp_path / "a.ckpt")
    assert torch.equal(model.blocks[3].mlp.fc1.weight, vit.blocks[3].mlp.fc1.weight)

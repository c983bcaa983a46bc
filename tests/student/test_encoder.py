"""The encoder: masking happens before it, and everything else is timm's ViT."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastmae.errors import InputError
from fastmae.student.encoder import build_encoder, sincos_positions, visible_patches, without_masking

B, N, V = 3, 16, 4

PLAIN_AND_ROTARY = [
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_gap_224",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_rope_reg1_gap_256",
]


def test_the_paper_has_49_of_196_patches_visible():
    assert visible_patches(196, 0.75) == 49


@pytest.mark.parametrize("mask_ratio", [0.999, 1e-17])
def test_some_patches_must_be_visible_and_some_masked(mask_ratio):
    with pytest.raises(InputError, match="--mask-ratio"):
        visible_patches(196, mask_ratio)


@pytest.mark.parametrize("name", PLAIN_AND_ROTARY)
def test_masked_pixels_never_reach_the_encoder(name, make_student, batch):
    images, _, ids_shuffle = batch
    model = make_student(name)
    repainted = images.clone()
    for b in range(B):
        for index in ids_shuffle[b, V:].tolist():
            row, col = divmod(index, 4)
            repainted[b, :, 16 * row : 16 * row + 16, 16 * col : 16 * col + 16] = 99.0
    with torch.no_grad():
        layers, layers_of_repainted = (model.encode(pixels, ids_shuffle[:, :V]) for pixels in (images, repainted))
    assert len(layers) == 3
    for layer, layer_of_repainted in zip(layers, layers_of_repainted, strict=True):
        assert layer.shape == (B, V, 48)
        assert torch.equal(layer, layer_of_repainted)


@pytest.mark.parametrize("name", PLAIN_AND_ROTARY)
def test_encoding_all_patches_equals_timms_own_forward(name, make_student, batch):
    images, _, _ = batch
    model = make_student(name)
    all_ids = torch.arange(N).expand(B, N)
    with torch.no_grad():
        encoded = model.encode(images, all_ids)[-1]
        expected = without_masking(model.encoder).forward_features(images)[:, model.encoder.num_prefix_tokens :]
    torch.testing.assert_close(encoded, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PLAIN_AND_ROTARY)
def test_projecting_only_the_visible_patches_equals_projecting_all_and_dropping_the_others(name, make_student, batch):
    model = make_student(name)
    images, ids_keep = batch[0].clone().requires_grad_(), batch[2][:, :V]
    timms_projection = torch.nn.Conv2d(3, 48, 16, 16)
    timms_projection.load_state_dict(model.encoder.patch_embed.proj.state_dict())
    outputs = []
    for projection in (model.encoder.patch_embed.proj, timms_projection):
        model.encoder.patch_embed.proj = projection
        encoded = model.encode(images, ids_keep)[-1]
        outputs.append((encoded, *torch.autograd.grad(encoded.square().sum(), [images, projection.weight])))
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


def test_projecting_a_quarter_of_the_patches_takes_a_quarter_of_the_flops(make_student, batch):
    images, _, ids_shuffle = batch
    projection = make_student().encoder.patch_embed.proj
    flops = []
    for ids_keep in (ids_shuffle[:, :V], ids_shuffle):
        projection.ids_keep = ids_keep
        with FlopCounterMode(display=False) as counter:
            projection(images)
        flops.append(counter.get_total_flops())
    assert flops[0] == 2 * B * V * 48 * 3 * 16 * 16
    assert flops[1] == 4 * flops[0]


def test_after_pre_training_the_encoder_has_only_timms_and_torchs_modules(make_student):
    encoder = without_masking(make_student().encoder)
    assert not [name for name, module in encoder.named_modules() if type(module).__module__.startswith("fastmae")]


def test_positions_are_fixed_sincos_and_the_class_token_has_none(make_student):
    model = make_student()
    assert not model.encoder.pos_embed.requires_grad
    assert not model.decoder_position.requires_grad
    assert torch.equal(model.encoder.pos_embed[0, 0], torch.zeros(48))
    assert torch.equal(model.encoder.pos_embed[0, 1:], sincos_positions((4, 4), 48))
    distances = torch.cdist(sincos_positions((4, 4), 48), sincos_positions((4, 4), 48)) + 9 * torch.eye(16)
    assert distances.min() > 0.1  # no two positions are alike


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet50"}, "--encoder resnet50"),
        ({"name": "vit_no_such"}, "--encoder vit_no_such"),
        ({"name": "vit_relpos_small_patch16_224"}, "--encoder vit_relpos_small_patch16_224"),
        ({"name": "vit_tiny_r_s16_p8_224"}, "--encoder vit_tiny_r_s16_p8_224"),
        ({"image_size": 100}, "--image-size 100.* 96"),
        ({"width": 50}, "--encoder vit_tiny_patch16_224"),
        ({"width": 54, "heads": 3}, "width 54"),
    ],
)
def test_an_encoder_that_cannot_be_built_is_an_input_error(options, message):
    sizes = {
        "name": "vit_tiny_patch16_224",
        "image_size": 64,
        "patch_size": 16,
        "width": 48,
        "depth": 2,
        "heads": 3,
        **options,
    }
    with pytest.raises(InputError, match=message):
        build_encoder(**sizes)

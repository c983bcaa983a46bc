"""The encoder: masking happens before it, and everything else is timm's ViT."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastmae.errors import InputError
from fastmae.images.views import PixelScale
from fastmae.student.encoder import (
    build_encoder,
    cut_patches,
    embed_visible,
    number_of_heads,
    sincos_positions,
    visible_patches,
)

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
        expected = model.encoder.forward_features(images)[:, model.encoder.num_prefix_tokens :]
    torch.testing.assert_close(encoded, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PLAIN_AND_ROTARY)
def test_embedding_only_the_visible_patches_equals_embedding_all_and_dropping_the_others(name, make_student, batch):
    encoder = make_student(name).encoder
    images, ids_keep = batch[0].clone().requires_grad_(), batch[2][:, :V]
    weight, prefix = encoder.patch_embed.proj.weight, encoder.num_prefix_tokens
    visible = embed_visible(encoder, cut_patches(images, 16, ids_keep), ids_keep)
    embedded = encoder._pos_embed(encoder.patch_embed(images))
    everything = encoder.norm_pre(embedded[0] if isinstance(embedded, tuple) else embedded)
    kept = everything[:, prefix:].gather(1, ids_keep.unsqueeze(-1).expand(-1, -1, 48))
    outputs = [
        (tokens, *torch.autograd.grad(tokens.square().sum(), [images, weight]))
        for tokens in (visible, torch.cat([everything[:, :prefix], kept], dim=1))
    ]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


def test_projecting_a_quarter_of_the_patches_takes_a_quarter_of_the_flops(make_student, batch):
    images, _, ids_shuffle = batch
    encoder = make_student().encoder
    flops = []
    for ids_keep in (ids_shuffle[:, :V], ids_shuffle):
        with FlopCounterMode(display=False) as counter:
            embed_visible(encoder, cut_patches(images, 16, ids_keep), ids_keep)
        flops.append(counter.get_total_flops())
    assert flops[0] == 2 * B * V * 48 * 3 * 16 * 16
    assert flops[1] == 4 * flops[0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_cut_patch_is_the_images_square_at_its_place(layout):
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8).contiguous(memory_format=layout)
    ids_keep = torch.tensor([[5, 0], [3, 4]])
    patches = cut_patches(images, 4, ids_keep)
    for b, number in ((b, number) for b in range(2) for number in range(2)):
        row, col = divmod(int(ids_keep[b, number]), 3)
        assert torch.equal(patches[b, number], images[b, :, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4])


def test_normalising_the_cut_patches_equals_cutting_the_normalised_image(make_student, batch):
    pixels, ids_keep = (255 * torch.rand(B, 3, 64, 64)).byte(), batch[2][:, :V]
    pixel_scale, model = PixelScale((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), make_student()
    for layout in (torch.contiguous_format, torch.channels_last):
        stored = pixels.contiguous(memory_format=layout)
        raw = model.encode_tokens(stored, ids_keep, pixel_scale)
        normalised = model.encode_tokens(pixel_scale(stored), ids_keep)
        assert all(torch.equal(*layers) for layers in zip(raw.tokens, normalised.tokens, strict=True))


def test_a_built_encoder_has_only_timms_and_torchs_modules():
    encoder = build_encoder("vit_tiny_patch16_224", 64, 16, width=48, depth=2, heads=3)
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


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_dpwee_patch16_reg1_gap_256", "vit_small_patch16_18x2_224"]
)
def test_the_heads_of_any_vit_are_counted(name):
    encoder = timm.create_model(name, embed_dim=64, depth=1, num_heads=4)
    assert number_of_heads(encoder) == 4

"""The baseline of `bench step` is MAE: the student with pixel targets, `PublishedMae` and transformers' port agree."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from fastmae.bench.published_mae import PublishedMae
from fastmae.config import PretrainConfig
from fastmae.student.encoder import cut_patches, sincos_positions
from fastmae.student.loss import StudentLoss
from fastmae.student.student import build_student
from fastmae.student.targets import norm_pix

B, SIDE, PATCH, N, V = 3, 96, 16, 36, 9
WIDTH, DEPTH, HEADS = 48, 3, 3
DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS = 32, 8, 4
PUBLISHED_NAMES = [
    r"cls_token",
    r"pos_embed",
    r"mask_token",
    r"decoder_pos_embed",
    r"patch_embed\.proj\.(weight|bias)",
    r"decoder_embed\.(weight|bias)",
    r"(decoder_)?blocks\.\d\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)",
    r"(decoder_)?norm\.(weight|bias)",
    r"decoder_pred\.(weight|bias)",
]
"""The parameter names of MAE's published checkpoints, as regular expressions."""


def published_names(state):
    """A student's state under the names, and in the shapes, of MAE's published checkpoints."""
    renamed = {}
    for name, weight in state.items():
        if name == "decoder_position":
            renamed["decoder_pos_embed"] = F.pad(weight, (0, 0, 1, 0))[None]  # zeros for the class token
        else:
            renamed[name.removeprefix("encoder.").replace("decoder_head.", "decoder_pred.")] = weight
    return renamed


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    options = PretrainConfig(
        stores=("unused.tokens",),
        run=Path("unused"),
        target="pixels",
        encoder_width=WIDTH,
        encoder_depth=DEPTH,
        encoder_heads=HEADS,
        image_size=SIDE,
        decoder_width=DECODER_WIDTH,
        decoder_heads=DECODER_HEADS,
    )
    student = build_student(options, PATCH, 3 * PATCH**2, 3)
    for parameter in student.parameters():  # biases and norms too, so that a missing one shows
        torch.nn.init.normal_(parameter, std=0.1)
    return student


@pytest.fixture(scope="module")
def published(student):
    grid = SIDE // PATCH, SIDE // PATCH
    positions = sincos_positions(grid, WIDTH), sincos_positions(grid, DECODER_WIDTH)
    decoder = DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS
    mae = PublishedMae(PATCH, WIDTH, DEPTH, HEADS, V, positions, decoder)
    mae.load_state_dict(published_names(student.state_dict()))
    return mae


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, SIDE, SIDE, generator=generator), torch.rand(B, N, generator=generator).argsort(1)


def test_every_parameter_has_the_name_of_the_published_checkpoints(student, published):
    names = set(published_names(student.state_dict()))
    assert names == set(published.state_dict())
    assert all(any(re.fullmatch(pattern, name) for name in names) for pattern in PUBLISHED_NAMES)
    assert all(any(re.fullmatch(pattern, name) for pattern in PUBLISHED_NAMES) for name in names)


def test_the_student_with_pixel_targets_has_the_published_output_loss_and_gradients(student, published, batch):
    images, ids_shuffle = batch
    prediction = student(images, ids_shuffle)
    published_prediction = published.predict(images, ids_shuffle)
    ids_masked = ids_shuffle[:, V:, None].expand(-1, -1, published_prediction.shape[2])
    masked = published_prediction.gather(1, ids_masked)
    torch.testing.assert_close(prediction.decoded, masked, atol=1e-5, rtol=1e-5)
    student_loss = StudentLoss(("mse",), 1.0, (3 * PATCH**2,), (1.0,))
    loss = student_loss(prediction, norm_pix(cut_patches(images, PATCH, ids_shuffle)))["loss"]
    published_loss = published(images, ids_shuffle)
    torch.testing.assert_close(loss, published_loss, atol=1e-5, rtol=1e-5)
    gradients = published_names(gradients_of(loss, student))
    published_gradients = gradients_of(published_loss, published)
    assert gradients.keys() == published_gradients.keys()
    for name, gradient in published_gradients.items():
        assert gradient.any(), name
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def gradients_of(loss, model):
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


def test_published_mae_equals_the_port_in_transformers(published, batch):
    images, ids_shuffle = batch
    config = transformers.ViTMAEConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=SIDE,
        patch_size=PATCH,
        decoder_hidden_size=DECODER_WIDTH,
        decoder_num_hidden_layers=DECODER_DEPTH,
        decoder_num_attention_heads=DECODER_HEADS,
        decoder_intermediate_size=4 * DECODER_WIDTH,
        norm_pix_loss=True,
        layer_norm_eps=1e-6,
        mask_ratio=0.75,
    )
    port = transformers.ViTMAEForPreTraining(config).eval()
    port.load_state_dict(in_transformers_names(published.state_dict()))
    noise = ids_shuffle.argsort(1).float()  # transformers' ids_shuffle is its argsort
    with torch.no_grad():
        output = port(images, noise=noise)
        torch.testing.assert_close(published.predict(images, ids_shuffle), output.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(published(images, ids_shuffle), output.loss)


TRANSFORMERS_NAMES = {
    r"^decoder_blocks\.": "decoder.decoder_layers.",
    r"^blocks\.": "vit.layers.",
    r"norm1": "layernorm_before",
    r"norm2": "layernorm_after",
    r"attn\.proj": "attention.o_proj",
    r"attn\.": "attention.",
    r"^patch_embed\.proj": "vit.embeddings.patch_embeddings.projection",
    r"^cls_token": "vit.embeddings.cls_token",
    r"^pos_embed": "vit.embeddings.position_embeddings",
    r"^norm\.": "vit.layernorm.",
    r"^(mask_token|decoder_)": r"decoder.\1",
}
"""Replacements, in this order, that turn a published name into transformers'."""


def in_transformers_names(state):
    renamed = {}
    for published_name, weight in state.items():
        name = published_name
        for pattern, replacement in TRANSFORMERS_NAMES.items():
            name = re.sub(pattern, replacement, name)
        if "qkv" in name:
            for letter, rows in zip("qkv", weight.chunk(3), strict=True):
                renamed[name.replace("qkv", f"{letter}_proj")] = rows
        else:
            renamed[name] = weight
    return renamed

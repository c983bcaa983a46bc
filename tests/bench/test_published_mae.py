"""What `bench step` measures against is MAE: the student with pixel targets, the authors' way, transformers' port are one function."""

import re
from pathlib import Path

import pytest
import torch
import transformers

from fastmae.bench.published_mae import PublishedMae, published_names
from fastmae.config import PretrainConfig, implied_values
from fastmae.student.encoder import sincos_positions
from fastmae.student.loss import StudentLoss
from fastmae.student.student import build_student
from fastmae.student.targets import norm_pix

B, SIDE, PATCH, N, V = 3, 96, 16, 36, 9
WIDTH, DEPTH, HEADS = 48, 3, 3
DECODER = 32, 8, 4
NAMES = [
    r"cls_token", r"pos_embed", r"mask_token", r"decoder_pos_embed", r"patch_embed\.proj\.(weight|bias)", r"decoder_embed\.(weight|bias)",
    r"(decoder_)?blocks\.\d\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)", r"(decoder_)?norm\.(weight|bias)",
    r"decoder_pred\.(weight|bias)",
]  # fmt: skip
"""Of MAE's published checkpoints."""


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    options = implied_values("pixels") | {"decoder_width": DECODER[0], "decoder_heads": DECODER[2]}
    sizes = {"encoder_width": WIDTH, "encoder_depth": DEPTH, "encoder_heads": HEADS, "image_size": SIDE}
    student = build_student(
        PretrainConfig(stores=(), run=Path(), target="pixels", **sizes, **options), PATCH, 3 * PATCH**2, 3
    )
    for parameter in student.parameters():  # biases and norms too, so that a missing one shows
        torch.nn.init.normal_(parameter, std=0.1)
    return student


@pytest.fixture(scope="module")
def published(student):
    grid = SIDE // PATCH, SIDE // PATCH
    mae = PublishedMae(
        PATCH, WIDTH, DEPTH, HEADS, V, (sincos_positions(grid, WIDTH), sincos_positions(grid, DECODER[0])), DECODER
    )
    mae.load_state_dict(published_names(student.state_dict()))
    return mae


@pytest.fixture(scope="module")
def batch():
    draws = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, SIDE, SIDE, generator=draws), torch.rand(B, N, generator=draws).argsort(1)


def test_every_parameter_has_the_name_of_the_published_checkpoints(student, published):
    names = set(published_names(student.state_dict()))
    assert names == set(published.state_dict())
    assert all(any(re.fullmatch(name, given) for given in names) for name in NAMES)
    assert all(any(re.fullmatch(name, given) for name in NAMES) for given in names)


def test_the_student_with_pixel_targets_has_the_published_output_loss_and_gradients(student, published, batch):
    images, ids_shuffle = batch
    prediction = student(images, ids_shuffle)
    theirs = published.predict(images, ids_shuffle)
    masked = theirs.gather(1, ids_shuffle[:, V:, None].expand(-1, -1, theirs.shape[2]))
    torch.testing.assert_close(prediction.decoded, masked, atol=1e-5, rtol=1e-5)
    loss = StudentLoss("mse", 1.0, (3 * PATCH**2,), (1.0,))(prediction, norm_pix(images, PATCH), ids_shuffle)["loss"]
    torch.testing.assert_close(loss, published(images, ids_shuffle), atol=1e-5, rtol=1e-5)
    mine = published_names(
        dict(zip(trained(student), torch.autograd.grad(loss, trained(student).values()), strict=True))
    )
    wanted = dict(
        zip(trained(published), torch.autograd.grad(published(images, ids_shuffle), trained(published).values()), strict=True)
    )
    assert mine.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.any(), name
        torch.testing.assert_close(mine[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_published_way_is_what_transformers_ports(published, batch):
    images, ids_shuffle = batch
    config = transformers.ViTMAEConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=4 * WIDTH, image_size=SIDE,
        patch_size=PATCH, decoder_hidden_size=DECODER[0], decoder_num_hidden_layers=DECODER[1], decoder_num_attention_heads=DECODER[2],
        decoder_intermediate_size=4 * DECODER[0], norm_pix_loss=True, layer_norm_eps=1e-6, mask_ratio=0.75,
    )  # fmt: skip
    port = transformers.ViTMAEForPreTraining(config).eval()
    port.load_state_dict(in_transformers_names(published.state_dict()))
    with torch.no_grad():
        out = port(images, noise=ids_shuffle.argsort(1).float())  # whose argsort is the ids_shuffle
        torch.testing.assert_close(published.predict(images, ids_shuffle), out.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(published(images, ids_shuffle), out.loss)


TRANSFORMERS_NAMES = {
    r"^decoder_blocks\.": "decoder.decoder_layers.", r"^blocks\.": "vit.layers.", r"norm1": "layernorm_before", r"norm2": "layernorm_after",
    r"attn\.proj": "attention.o_proj", r"attn\.": "attention.", r"^patch_embed\.proj": "vit.embeddings.patch_embeddings.projection",
    r"^cls_token": "vit.embeddings.cls_token", r"^pos_embed": "vit.embeddings.position_embeddings", r"^norm\.": "vit.layernorm.",
    r"^(mask_token|decoder_)": r"decoder.\1",
}  # fmt: skip


def in_transformers_names(state):
    renamed = {}
    for published_name, weight in state.items():
        name = published_name
        for old, new in TRANSFORMERS_NAMES.items():
            name = re.sub(old, new, name)
        parts = zip("qkv", weight.chunk(3), strict=True) if "qkv" in name else [("", weight)]
        renamed |= {name.replace("qkv", f"{letter}_proj"): part for letter, part in parts}
    return renamed

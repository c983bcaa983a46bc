"""The FLOPs of a training step, against a count by hand."""

from pathlib import Path

import pytest

from fastmae.config import PretrainConfig
from fastmae.studies.flops import IMAGES, training_flops

DEPTH, WIDTH, DECODER, CHANNELS = 2, 64, 32, 192
PATCHES, VISIBLE, PATCH_VALUES = 16, 4, 3 * 16 * 16


def options(store, **given):
    encoder = {"encoder": "vit_tiny_patch16_224", "encoder_depth": DEPTH, "encoder_width": WIDTH, "encoder_heads": 2}
    student = {**encoder, "image_size": 64, "decoder_width": DECODER, "decoder_heads": 2, "norm": "patch"}
    return PretrainConfig(stores=(str(store),), run=Path("none"), device="cpu", **{**student, **given})


def linear(tokens, inputs, outputs):
    return 2 * tokens * inputs * outputs


def block(tokens, width):
    """Queries, keys and values; the two products of attention; its projection; and the MLP of four times the width."""
    attention = linear(tokens, width, 3 * width) + 2 * linear(tokens, width, tokens) + linear(tokens, width, width)
    return attention + 2 * linear(tokens, width, 4 * width)


def test_a_vit_without_a_decoder_has_the_flops_of_a_count_by_hand(vit_store):
    flops = training_flops(options(vit_store, decoder_depth=0))
    patch_embedding = linear(VISIBLE, PATCH_VALUES, WIDTH)
    blocks = DEPTH * block(VISIBLE + 1, WIDTH)  # with the class token
    heads = DEPTH * linear(VISIBLE + 1, WIDTH, CHANNELS)
    # The shift of each norm that a head reads is folded into the layers behind it, once for all images.
    folded = DEPTH * linear(1, WIDTH, CHANNELS) + (DEPTH - 1) * linear(1, WIDTH, 3 * WIDTH)
    # Backward: the gradients of inputs and of weights, twice the forward; the pixels need no gradient.
    assert flops == pytest.approx(2 * patch_embedding + 3 * (blocks + heads + folded / IMAGES))


def test_a_decoder_adds_flops_and_an_online_teacher_its_forward(vit_store):
    plain = training_flops(options(vit_store))
    assert plain > training_flops(options(vit_store, decoder_depth=0))
    assert training_flops(options(vit_store, decoder_depth=2)) > plain
    assert training_flops(options(vit_store, target="teacher")) > 2 * plain


def test_every_batch_size_has_the_same_flops(vit_store):
    assert training_flops(options(vit_store, batch_size=8)) == training_flops(options(vit_store, batch_size=64))

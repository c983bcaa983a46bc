"""The student as a whole: it compiles, every parameter learns, and the options of the decoder do what they say."""

import pytest
import torch
from timm.models.vision_transformer import Block

from fastmae.config import PretrainConfig
from fastmae.errors import InputError
from fastmae.student.loss import StudentLoss
from fastmae.student.student import build_student, layer_numbers

V, C = 4, 10


def loss_of(model, images, target, ids_shuffle):
    loss = StudentLoss(("smooth-l1",), 1.0, (C,), (1.0,))
    return loss(model(images, ids_shuffle), target)["loss"]


def test_recomputed_activations_change_no_gradient(make_student, batch):
    gradients = []
    for checkpoint_activations in (False, True):
        model = make_student(checkpoint_activations=checkpoint_activations).train()
        loss_of(model, *batch).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fusion": True},
        {"all_layers": False},
        {"decoder_depth": 3},
        {"decoder_depth": 0},
        {"decoder_depth": 0, "all_layers": False, "relation_layers": [2]},
        {"decoder_depth": 0, "mask_ratio": 0.0},
    ],
)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "vit_base_patch16_gap_224"])
def test_every_trainable_parameter_gets_a_gradient(name, options, make_student, batch):
    model = make_student(name, **options)
    loss_of(model, *batch).backward()
    without_gradient = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert without_gradient == []  # DDP would wait for them


def test_fusion_reads_every_layer(make_student, batch):
    images, _, ids_shuffle = batch
    model = make_student(fusion=True, all_layers=False)
    layers = [layer.detach().requires_grad_() for layer in model.encode_tokens(images, ids_shuffle[:, :V]).tokens]
    model.decode(layers, ids_shuffle).square().sum().backward()
    assert all(layer.grad is not None and layer.grad.any() for layer in layers)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("options", [{}, {"decoder_depth": 3}, {"predict_visible": True}])
def test_the_decoder_can_see_the_class_token_without_a_further_parameter(name, options, make_student, batch):
    images, _, ids_shuffle = batch
    with_token, without = (make_student(name, decoder_class_token=seen, **options) for seen in (True, False))
    without.load_state_dict(with_token.state_dict())
    layers = with_token.encode_tokens(images, ids_shuffle[:, :V]).tokens
    decoded = with_token.decode(layers, ids_shuffle)
    torch.testing.assert_close(decoded, with_token(images, ids_shuffle).decoded)
    assert decoded.shape == without(images, ids_shuffle).decoded.shape
    assert (decoded - without(images, ids_shuffle).decoded).abs().max() > 1e-3
    gradient = torch.autograd.grad(decoded.sum(), layers[-1])[0][:, : with_token.encoder.num_prefix_tokens]
    assert all(of_token.any() for of_token in gradient.unbind(1))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_gap_224"])
@pytest.mark.parametrize("decoder_class_token", [True, False])
@pytest.mark.parametrize("options", [{}, {"fusion": True}, {"decoder_depth": 2}, {"predict_visible": True}])
def test_decoding_is_what_timms_blocks_make_of_all_tokens(name, decoder_class_token, options, make_student, batch):
    images, _, ids_shuffle = batch
    model = make_student(name, decoder_class_token=decoder_class_token, **options)
    layers = [layer.detach().requires_grad_() for layer in model.encode_tokens(images, ids_shuffle[:, :V]).tokens]
    prefix = model.encoder.num_prefix_tokens
    latent = layers[-1][:, prefix:]
    if model.fusion_projections:
        latent = sum(
            project(layer[:, prefix:]) for project, layer in zip(model.fusion_projections, layers, strict=True)
        )
        latent = model.fusion_norm(latent)
    positions = model.decoder_position[ids_shuffle]
    mask_tokens = model.mask_token + positions[:, V:]
    tokens = torch.cat([model.decoder_embed(latent) + positions[:, :V], mask_tokens], dim=1)
    if decoder_class_token:
        tokens = torch.cat([model.decoder_embed(layers[-1][:, :prefix]), tokens], dim=1)
    for block in model.decoder_blocks:
        tokens = Block.forward(block, tokens)
    predicted = 16 if "predict_visible" in options else 16 - V
    expected = model.decoder_head(model.decoder_norm(tokens))[:, -predicted:]
    decoded = model.decode(layers, ids_shuffle)
    torch.testing.assert_close(decoded, expected, atol=1e-6, rtol=1e-5)
    leaves = [*layers[0 if model.fusion_projections else -1 :]]
    leaves += [parameter for name, parameter in model.named_parameters() if "decoder_" in name or "mask_token" in name]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    gradients, expected_gradients = (torch.autograd.grad(out.square().mean(), leaves) for out in (decoded, expected))
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-6, rtol=1e-4)


def test_it_learns_one_batch_by_heart(make_student, batch):
    model = make_student().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = loss_of(model, *batch).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = loss_of(model, *batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first


def test_without_a_mask_every_patch_is_encoded_and_predicted_in_the_given_order(make_student, batch):
    images, _, ids_shuffle = batch
    model = make_student(mask_ratio=0.0, decoder_depth=0, all_layers=False)
    prediction = model(images, ids_shuffle)
    assert (model.visible, prediction.decoded, len(prediction.layers)) == (16, None, 1)
    in_order = model(images, torch.arange(16).expand(3, -1)).layers[0]
    expected = in_order.gather(1, ids_shuffle.unsqueeze(-1).expand(-1, -1, C))
    torch.testing.assert_close(prediction.layers[0], expected)


def test_without_a_decoder_the_student_has_none_of_its_weights(make_student):
    names = {name.split(".")[0] for name, _ in make_student(decoder_depth=0).named_parameters()}
    assert names == {"encoder", "layer_heads"}


@pytest.mark.parametrize(("layers", "numbers"), [("last", [2]), ("all", [0, 1, 2]), ("2,0,2", [0, 2])])
def test_relation_layers_are_last_all_or_numbers(layers, numbers):
    assert layer_numbers(layers, depth=3) == numbers


@pytest.mark.parametrize("layers", ["3", "-1", "first", "", "0,,1"])
def test_relation_layers_that_the_encoder_does_not_have_are_refused(layers):
    with pytest.raises(InputError, match="--relation-layers"):
        layer_numbers(layers, depth=3)


@pytest.mark.promise("numbers")
@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"encoder_depth": 256, "encoder_width": 65536}, "--encoder-width, --encoder-depth"),
        ({"decoder_depth": 256, "decoder_width": 65536}, "--decoder-width, --decoder-depth"),
        ({"image_size": 16384, "encoder_width": 20480, "encoder_depth": 1}, "--image-size, --encoder-width"),
    ],
)
def test_a_student_that_no_memory_holds_is_refused_before_it_is_built(sizes, options):
    config = PretrainConfig(stores=("a.tokens",), run="run", **sizes)
    with pytest.raises(InputError, match=f"^{options}: a student of .* billion weights and more; .* 20 billion"):
        build_student(config, 16, 8, 3)

"""The student: masking before the encoder, one-block decoder, the losses, against what they say written out."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastmae.errors import InputError
from fastmae.student.encoder import build_encoder, sincos_positions, visible_patches, without_masking
from fastmae.student.loss import StudentLoss
from fastmae.student.student import Student

B, N, C = 3, 16, 10


PLAIN_AND_ROTARY = [
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_gap_224",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_rope_reg1_gap_256",
]


def student(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    encoder = build_encoder(name, 64, 16, 48, 3, 3)
    return Student(encoder, C, decoder_width=32, decoder_heads=4, **options).eval()


def losses(model, images, target, ids_shuffle, kind="smooth-l1", layers_weight=1.0):
    return StudentLoss(kind, layers_weight, (C,), (1.0,))(model(images, ids_shuffle), target, ids_shuffle)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    ids_shuffle = torch.stack([torch.randperm(N, generator=generator) for _ in range(B)])
    return torch.randn(B, 3, 64, 64, generator=generator), torch.randn(B, N, C, generator=generator), ids_shuffle


def test_the_paper_has_49_of_196_patches_visible():
    assert visible_patches(196, 0.75) == 49
    for ratio in (0.0, 1.0, -1.0, 2.0, 0.999, float("nan")):
        with pytest.raises(InputError):
            visible_patches(196, ratio)


@pytest.mark.parametrize("name", PLAIN_AND_ROTARY)
def test_masked_pixels_never_reach_the_encoder(name, batch):
    images, _, ids_shuffle = batch
    model = student(name)
    changed = images.clone()
    for b in range(B):
        for place in ids_shuffle[b, 4:].tolist():
            row, col = divmod(place, 4)
            changed[b, :, 16 * row : 16 * row + 16, 16 * col : 16 * col + 16] = 99.0
    with torch.no_grad():
        for before, after in zip(model.encode(images, ids_shuffle[:, :4]), model.encode(changed, ids_shuffle[:, :4]), strict=True):
            assert before.shape == (B, 4, 48)
            assert torch.equal(before, after)


@pytest.mark.parametrize("name", PLAIN_AND_ROTARY)
def test_encoding_all_patches_is_timms_own_forward(name, batch):
    images, _, _ = batch
    model = student(name)
    everything = torch.arange(N).expand(B, N)
    with torch.no_grad():
        encoded = model.encode(images, everything)[-1]
        whole = without_masking(model.encoder).forward_features(images)[:, model.encoder.num_prefix_tokens :]
    torch.testing.assert_close(encoded, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PLAIN_AND_ROTARY)
def test_embedding_the_visible_patches_alone_gives_what_embedding_all_and_dropping_gives(name, batch):
    model = student(name)
    images, visible = batch[0].clone().requires_grad_(), batch[2][:, :4]
    whole = torch.nn.Conv2d(3, 48, 16, 16)  # timm's own
    whole.load_state_dict(model.encoder.patch_embed.proj.state_dict())
    found = []
    for projection in (model.encoder.patch_embed.proj, whole):
        model.encoder.patch_embed.proj = projection
        encoded = model.encode(images, visible)[-1]
        found.append((encoded, *torch.autograd.grad(encoded.square().sum(), [images, projection.weight])))
    for alone, dropped in zip(*found, strict=True):
        torch.testing.assert_close(alone, dropped, atol=1e-4, rtol=1e-4)


def test_the_projection_of_a_step_costs_the_visible_quarter(batch):
    images, _, ids_shuffle = batch
    model = student()
    costs = []
    for places in (ids_shuffle[:, :4], ids_shuffle):
        model.encoder.patch_embed.proj.ids_keep = places
        with FlopCounterMode(display=False) as counter:
            model.encoder.patch_embed.proj(images)
        costs.append(counter.get_total_flops())
    assert costs[0] == 2 * B * 4 * 48 * 3 * 16 * 16
    assert costs[1] == 4 * costs[0]


def test_after_pre_training_the_encoder_is_timms_own_kind_throughout():
    encoder = without_masking(student().encoder)
    assert not [name for name, module in encoder.named_modules() if type(module).__module__.startswith("fastmae")]


def test_the_loss_is_smooth_l1_on_masked_patches_plus_the_mean_over_layers_on_visible_ones(batch):
    images, target, ids_shuffle = batch
    model = student()
    with torch.no_grad():
        out = losses(model, images, target, ids_shuffle, layers_weight=0.5)
        prediction = model(images, ids_shuffle)
        masked = torch.stack([target[b, ids_shuffle[b, 4:]] for b in range(B)])
        visible = torch.stack([target[b, ids_shuffle[b, :4]] for b in range(B)])
        error = (prediction.decoded - masked).abs()
        decoder = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
        encoded = model.encode(images, ids_shuffle[:, :4])
        layers = [
            F.smooth_l1_loss(head(layer), visible) for head, layer in zip(model.layer_heads, encoded, strict=True)
        ]
    torch.testing.assert_close(out["decoder_loss"], decoder)
    assert len(layers) == 3
    torch.testing.assert_close(out["layers_loss"], sum(layers) / 3)
    torch.testing.assert_close(out["loss"], decoder + 0.5 * sum(layers) / 3)
    assert prediction.decoded.shape == (B, 12, C)


def test_without_all_layers_there_are_no_heads_and_no_second_loss(batch):
    model = student(all_layers=False)
    out = losses(model, *batch)
    assert len(model.layer_heads) == 0
    assert out["layers_loss"] == 0
    assert torch.equal(out["loss"], out["decoder_loss"])


def test_mse_is_the_other_loss(batch):
    images, target, ids_shuffle = batch
    model = student(all_layers=False)
    masked = torch.stack([target[b, ids_shuffle[b, 4:]] for b in range(B)])
    torch.testing.assert_close(
        losses(model, *batch, kind="mse")["loss"], ((model(images, ids_shuffle).decoded - masked) ** 2).mean()
    )


def test_cosine_is_one_minus_the_cosine_of_each_masked_patch(batch):
    images, target, ids_shuffle = batch
    model = student(all_layers=False)
    masked = torch.stack([target[b, ids_shuffle[b, 4:]] for b in range(B)])
    decoded = model(images, ids_shuffle).decoded
    cosine = (decoded * masked).sum(-1) / (decoded.square().sum(-1) * masked.square().sum(-1)).sqrt()
    torch.testing.assert_close(losses(model, *batch, kind="cosine")["loss"], (1 - cosine).mean())


def test_predicting_all_patches_adds_the_visible_ones_to_the_decoders_loss(batch):
    images, target, ids_shuffle = batch
    model = student(all_layers=False, predict_visible=True)
    decoded = model(images, ids_shuffle).decoded
    assert decoded.shape == (B, N, C)
    torch.testing.assert_close(decoded[:, 4:], student(all_layers=False)(images, ids_shuffle).decoded)
    in_order = torch.stack([target[b, ids_shuffle[b]] for b in range(B)])
    torch.testing.assert_close(losses(model, *batch, kind="mse")["loss"], ((decoded - in_order) ** 2).mean())


def test_each_teachers_part_has_a_loss_of_its_own_weight(batch):
    images, target, ids_shuffle = batch
    model = student()
    both = StudentLoss("mse", 1.0, (4, 6), (1.0, 0.5))(model(images, ids_shuffle), target, ids_shuffle)
    prediction = model(images, ids_shuffle)
    for name, mine, wanted in (
        ("decoder_loss", prediction.decoded, ids_shuffle[:, 4:]),
        ("layers_loss", torch.stack(prediction.layers), ids_shuffle[:, :4]),
    ):
        target_there = torch.stack([target[b, wanted[b]] for b in range(B)])
        error = (mine - target_there).square()
        torch.testing.assert_close(both[name], error[..., :4].mean() + 0.5 * error[..., 4:].mean())


def test_recomputed_activations_change_no_gradient(batch):
    grads = []
    for again in (False, True):
        model = student(checkpoint_activations=again).train()
        losses(model, *batch)["loss"].backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_it_compiles_as_one_graph(name, batch):
    images, _, ids_shuffle = batch
    model = student(name)
    whole = torch.compile(model, backend="eager", fullgraph=True)  # traced, not generated: that takes minutes on a CPU
    for places in (ids_shuffle, ids_shuffle.flip(1)):
        torch.testing.assert_close(whole(images, places).decoded, model(images, places).decoded)


def test_a_half_precision_prediction_is_compared_with_the_fp32_target(batch):
    images, target, ids_shuffle = batch
    model = student()
    prediction = model(images, ids_shuffle)
    prediction.decoded = prediction.decoded.bfloat16()
    out = StudentLoss("smooth-l1", 1.0, (C,), (1.0,))(prediction, target * 1e5, ids_shuffle)
    assert out["loss"].dtype == torch.float32
    assert torch.isfinite(out["loss"])


def test_the_loss_does_not_depend_on_the_order_within_visible_and_masked(batch):
    images, target, ids_shuffle = batch
    shuffled = torch.cat([ids_shuffle[:, :4].flip(1), ids_shuffle[:, 4:].flip(1)], 1)
    for options in ({}, {"fusion": True}):
        model = student(**options)
        before, after = (losses(model, images, target, o)["loss"] for o in (ids_shuffle, shuffled))
        torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"fusion": True}, {"all_layers": False}, {"decoder_depth": 3}])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "vit_base_patch16_gap_224"])
def test_every_trainable_parameter_gets_a_gradient(name, options, batch):
    model = student(name, **options)
    losses(model, *batch)["loss"].backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []  # DDP would wait for them


def test_fusion_reads_every_layer(batch):
    images, _, ids_shuffle = batch
    model = student(fusion=True, all_layers=False)
    layers = [layer.detach().requires_grad_() for layer in model.encode(images, ids_shuffle[:, :4])]
    model.decode(layers, ids_shuffle).square().sum().backward()
    assert all(layer.grad is not None and layer.grad.any() for layer in layers)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("options", [{}, {"decoder_depth": 3}, {"predict_visible": True}])
def test_the_decoder_sees_the_class_token_where_asked_without_a_parameter_more(name, options, batch):
    images, _, ids_shuffle = batch
    with_class, without = (student(name, decoder_class_token=seen, **options) for seen in (True, False))
    without.load_state_dict(with_class.state_dict())
    prefix, layers = with_class.encode_with_prefix(images, ids_shuffle[:, :4])
    decoded = with_class.decode(layers, ids_shuffle, prefix)
    torch.testing.assert_close(decoded, with_class(images, ids_shuffle).decoded)
    assert decoded.shape == without(images, ids_shuffle).decoded.shape
    assert (decoded - without(images, ids_shuffle).decoded).abs().max() > 1e-3
    assert all(gradient.any() for gradient in torch.autograd.grad(decoded.sum(), prefix)[0].unbind(1))


def test_positions_are_fixed_sincos_and_the_class_token_has_none():
    model = student()
    assert not model.encoder.pos_embed.requires_grad
    assert not model.decoder_position.requires_grad
    assert torch.equal(model.encoder.pos_embed[0, 0], torch.zeros(48))
    assert torch.equal(model.encoder.pos_embed[0, 1:], sincos_positions((4, 4), 48))
    distances = torch.cdist(sincos_positions((4, 4), 48), sincos_positions((4, 4), 48)) + 9 * torch.eye(16)
    assert distances.min() > 0.1  # no two places alike


def test_it_learns_one_batch_by_heart(batch):
    torch.manual_seed(0)
    images, target, ids_shuffle = batch
    model = student().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = losses(model, images, target, ids_shuffle)["loss"].item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = losses(model, images, target, ids_shuffle)["loss"]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "resnet50"}, "not one of timm's vit_"),
        ({"name": "vit_no_such"}, "not one of timm's vit_"),
        ({"name": "vit_relpos_small_patch16_224"}, "take a plain ViT"),
        ({"name": "vit_tiny_r_s16_p8_224"}, "take a plain ViT|can't build it"),
        ({"image_size": 100}, "not a multiple"),
        ({"width": 50}, "can't build it"),
        ({"width": 54, "heads": 3}, "multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_input_errors(options, says):
    sizes = {
        "name": "vit_tiny_patch16_224",
        "image_size": 64,
        "patch_size": 16,
        "width": 48,
        "depth": 2,
        "heads": 3,
        **options,
    }
    with pytest.raises(InputError, match=says):
        build_encoder(**sizes)

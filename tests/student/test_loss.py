"""The loss against its formulas written out."""

import pytest
import torch
import torch.nn.functional as F

from fastmae.runtime.low_precision import with_fast_norms
from fastmae.student.attention import PackedBlock, with_packed_attention
from fastmae.student.loss import Prediction, StudentLoss, relation_loss

B, V, C = 3, 4, 10


def losses(model, images, target, ids_shuffle, kind="smooth-l1", layers_weight=1.0):
    return StudentLoss((kind,), layers_weight, (C,), (1.0,))(model(images, ids_shuffle), select(target, ids_shuffle))


def select(target, ids):
    return torch.stack([target[b, ids[b]] for b in range(B)])


def test_the_loss_is_smooth_l1_on_masked_patches_plus_the_mean_over_layers_on_visible_ones(make_student, batch):
    images, target, ids_shuffle = batch
    model = make_student()
    with torch.no_grad():
        scalars = losses(model, images, target, ids_shuffle, layers_weight=0.5)
        prediction = model(images, ids_shuffle)
        error = (prediction.decoded - select(target, ids_shuffle[:, V:])).abs()
        decoder_loss = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
        layers = model.encode(images, ids_shuffle[:, :V])
        visible_target = select(target, ids_shuffle[:, :V])
        layer_losses = [
            F.smooth_l1_loss(head(layer), visible_target) for head, layer in zip(model.layer_heads, layers, strict=True)
        ]
    torch.testing.assert_close(scalars["decoder_loss"], decoder_loss)
    assert len(layer_losses) == 3
    torch.testing.assert_close(scalars["layers_loss"], sum(layer_losses) / 3)
    torch.testing.assert_close(scalars["loss"], decoder_loss + 0.5 * sum(layer_losses) / 3)
    assert prediction.decoded.shape == (B, 12, C)


def test_heads_behind_shared_norms_predict_what_each_head_does(make_student, batch):
    images, _, ids_shuffle = batch
    model = make_student()
    for head in model.layer_heads:
        torch.nn.init.normal_(head[0].weight)
        torch.nn.init.normal_(head[0].bias)
    separate = [
        head(layer) for head, layer in zip(model.layer_heads, model.encode(images, ids_shuffle[:, :V]), strict=True)
    ]
    packed = with_packed_attention(with_fast_norms(model))
    assert {type(block) for block in packed.encoder.blocks} == {PackedBlock}
    torch.testing.assert_close(packed(images, ids_shuffle).layers, torch.stack(separate))


@pytest.mark.parametrize("kind", ["smooth-l1", "mse", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictions_from_prefix_tokens_have_no_loss_and_no_gradient(kind, dtype):
    generator = torch.Generator().manual_seed(5)
    heads = torch.randn(2, B, 1 + V, C, generator=generator).to(dtype).requires_grad_()
    target = torch.randn(B, V + 3, C, generator=generator)
    loss = StudentLoss((kind,), 1.0, (C,), (1.0,))
    found = loss(Prediction(None, heads, prefix=1), target)["loss"]
    gradient = torch.autograd.grad(found, heads)[0]
    cut = heads.detach()[:, :, 1:].clone().requires_grad_()
    expected = loss(Prediction(None, cut), target)["loss"]
    torch.testing.assert_close(found, expected)
    assert gradient.dtype == dtype
    assert not gradient[:, :, 0].any()
    torch.testing.assert_close(gradient[:, :, 1:], torch.autograd.grad(expected, cut)[0])


def test_without_all_layers_there_are_no_heads_and_no_second_loss(make_student, batch):
    model = make_student(all_layers=False)
    scalars = losses(model, *batch)
    assert len(model.layer_heads) == 0
    assert set(scalars) == {"loss", "decoder_loss"}
    assert torch.equal(scalars["loss"], scalars["decoder_loss"])


def test_mse_is_the_mean_squared_error_of_the_masked_patches(make_student, batch):
    images, target, ids_shuffle = batch
    model = make_student(all_layers=False)
    error = model(images, ids_shuffle).decoded - select(target, ids_shuffle[:, V:])
    torch.testing.assert_close(losses(model, *batch, kind="mse")["loss"], (error**2).mean())


def test_cosine_is_one_minus_the_cosine_of_each_masked_patch(make_student, batch):
    images, target, ids_shuffle = batch
    model = make_student(all_layers=False)
    masked_target = select(target, ids_shuffle[:, V:])
    decoded = model(images, ids_shuffle).decoded
    lengths = (decoded.square().sum(-1) * masked_target.square().sum(-1)).sqrt()
    cosine = (decoded * masked_target).sum(-1) / lengths
    torch.testing.assert_close(losses(model, *batch, kind="cosine")["loss"], (1 - cosine).mean())


def test_predicting_all_patches_adds_the_visible_ones_to_the_decoders_loss(make_student, batch):
    images, target, ids_shuffle = batch
    model = make_student(all_layers=False, predict_visible=True)
    decoded = model(images, ids_shuffle).decoded
    assert decoded.shape == target.shape
    torch.testing.assert_close(decoded[:, V:], make_student(all_layers=False)(images, ids_shuffle).decoded)
    error = decoded - select(target, ids_shuffle)
    torch.testing.assert_close(losses(model, *batch, kind="mse")["loss"], (error**2).mean())


def test_each_teachers_part_has_a_loss_of_its_own_weight(make_student, batch):
    images, target, ids_shuffle = batch
    prediction = make_student()(images, ids_shuffle)
    scalars = StudentLoss(("mse", "mse"), 1.0, (4, 6), (1.0, 0.5))(prediction, select(target, ids_shuffle))
    for name, pred, ids in (
        ("decoder_loss", prediction.decoded, ids_shuffle[:, V:]),
        ("layers_loss", prediction.layers, ids_shuffle[:, :V]),
    ):
        error = (pred - select(target, ids)).square()
        torch.testing.assert_close(scalars[name], error[..., :4].mean() + 0.5 * error[..., 4:].mean())


def test_a_half_precision_prediction_is_compared_with_the_target_in_fp32(make_student, batch):
    images, target, ids_shuffle = batch
    prediction = make_student()(images, ids_shuffle)
    prediction.decoded = prediction.decoded.bfloat16()
    scalars = StudentLoss(("smooth-l1",), 1.0, (C,), (1.0,))(prediction, target * 1e5)
    assert scalars["loss"].dtype == torch.float32
    assert torch.isfinite(scalars["loss"])


@pytest.mark.parametrize("options", [{}, {"fusion": True}])
def test_the_loss_does_not_depend_on_the_order_within_visible_and_masked(options, make_student, batch):
    images, target, ids_shuffle = batch
    reordered = torch.cat([ids_shuffle[:, :V].flip(1), ids_shuffle[:, V:].flip(1)], 1)
    model = make_student(**options)
    first, second = (losses(model, images, target, ids)["loss"] for ids in (ids_shuffle, reordered))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def centred_cosines(patches):
    """[V, D] -> [V, V], pair by pair as the formula has it."""
    centred = patches - patches.mean(0)
    rows = [[torch.dot(a, b) / (a.norm() * b.norm()) for b in centred] for a in centred]
    return torch.tensor(rows)


def test_the_relation_loss_is_the_mean_squared_difference_of_the_centred_cosine_matrices():
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(B, V, 6, generator=generator)
    target = torch.randn(B, V, C, generator=generator)
    views = [(centred_cosines(f) - centred_cosines(t)).square().mean() for f, t in zip(features, target, strict=True)]
    torch.testing.assert_close(relation_loss(features, target), torch.stack(views).mean())


def test_the_relation_loss_is_zero_for_rotated_scaled_and_shifted_targets_and_positive_for_others():
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(B, 8, 6, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    same = 3 * target @ rotation + torch.randn(B, 1, 6, generator=generator)
    torch.testing.assert_close(relation_loss(same, target), torch.tensor(0.0))
    assert relation_loss(torch.randn(B, 8, 6, generator=generator), target) > 0.1


def test_the_relation_loss_has_finite_gradients_where_all_patches_are_alike():
    features = torch.ones(B, V, 6, requires_grad=True)
    relation_loss(features, torch.randn(B, V, C)).backward()
    assert features.grad.isfinite().all()


def test_the_relation_term_compares_the_chosen_layers_at_the_visible_patches_with_each_teacher(make_student, batch):
    images, target, ids_shuffle = batch
    model = make_student(relation_layers=[0, 2])
    loss = StudentLoss(("mse", "mse"), 1.0, (4, 6), (1.0, 0.5), relation_weight=2.0)
    scalars = loss(model(images, ids_shuffle), select(target, ids_shuffle))
    layers = model.encode(images, ids_shuffle[:, :V])
    visible_target = select(target, ids_shuffle[:, :V])
    by_layer = [
        relation_loss(layers[number], visible_target[..., :4])
        + 0.5 * relation_loss(layers[number], visible_target[..., 4:])
        for number in (0, 2)
    ]
    torch.testing.assert_close(scalars["relation_loss"], sum(by_layer) / 2)
    terms = scalars["decoder_loss"] + scalars["layers_loss"] + 2 * scalars["relation_loss"]
    torch.testing.assert_close(scalars["loss"], terms)


def test_the_relation_term_is_computed_in_fp32_from_half_precision_features(batch):
    _, target, ids_shuffle = batch
    features = torch.randn(B, V, 6, generator=torch.Generator().manual_seed(4)).bfloat16()
    loss = StudentLoss(("mse",), 1.0, (C,), (1.0,), relation_weight=1.0)
    scalars = loss(Prediction(None, None, features=[features]), select(target, ids_shuffle))
    assert scalars["relation_loss"].dtype == torch.float32
    torch.testing.assert_close(scalars["loss"], relation_loss(features.float(), select(target, ids_shuffle[:, :V])))


def test_without_a_decoder_the_loss_is_that_of_the_visible_patches_alone(make_student, batch):
    images, target, ids_shuffle = batch
    model = make_student(decoder_depth=0, all_layers=False)
    scalars = losses(model, *batch, kind="cosine")
    last = model.layer_heads[0](model.encode(images, ids_shuffle[:, :V])[-1])
    expected = (1 - F.cosine_similarity(last, select(target, ids_shuffle[:, :V]), dim=-1)).mean()
    assert set(scalars) == {"loss", "layers_loss"}
    torch.testing.assert_close(scalars["loss"], expected)

"""The loss against its formulas written out."""

import pytest
import torch
import torch.nn.functional as F

from fastmae.student.loss import StudentLoss

B, V, C = 3, 4, 10


def losses(model, images, target, ids_shuffle, kind="smooth-l1", layers_weight=1.0):
    return StudentLoss(kind, layers_weight, (C,), (1.0,))(model(images, ids_shuffle), target, ids_shuffle)


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


def test_without_all_layers_there_are_no_heads_and_no_second_loss(make_student, batch):
    model = make_student(all_layers=False)
    scalars = losses(model, *batch)
    assert len(model.layer_heads) == 0
    assert scalars["layers_loss"] == 0
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
    scalars = StudentLoss("mse", 1.0, (4, 6), (1.0, 0.5))(prediction, target, ids_shuffle)
    for name, pred, ids in (
        ("decoder_loss", prediction.decoded, ids_shuffle[:, V:]),
        ("layers_loss", torch.stack(prediction.layers), ids_shuffle[:, :V]),
    ):
        error = (pred - select(target, ids)).square()
        torch.testing.assert_close(scalars[name], error[..., :4].mean() + 0.5 * error[..., 4:].mean())


def test_a_half_precision_prediction_is_compared_with_the_target_in_fp32(make_student, batch):
    images, target, ids_shuffle = batch
    prediction = make_student()(images, ids_shuffle)
    prediction.decoded = prediction.decoded.bfloat16()
    scalars = StudentLoss("smooth-l1", 1.0, (C,), (1.0,))(prediction, target * 1e5, ids_shuffle)
    assert scalars["loss"].dtype == torch.float32
    assert torch.isfinite(scalars["loss"])


@pytest.mark.parametrize("options", [{}, {"fusion": True}])
def test_the_loss_does_not_depend_on_the_order_within_visible_and_masked(options, make_student, batch):
    images, target, ids_shuffle = batch
    reordered = torch.cat([ids_shuffle[:, :V].flip(1), ids_shuffle[:, V:].flip(1)], 1)
    model = make_student(**options)
    first, second = (losses(model, images, target, ids)["loss"] for ids in (ids_shuffle, reordered))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)

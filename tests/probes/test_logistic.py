import pytest
import torch

from fastmae.probes import logistic
from fastmae.probes.logistic import fit, linear_accuracy, objective, scores_by_lbfgs, scores_by_scikit_learn


@pytest.mark.parametrize("classes", [2, 7])
def test_separable_classes_are_all_recognised_whatever_the_scale_of_the_features(classes):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 16, generator=generator)
    labels = torch.arange(classes).repeat_interleave(20)
    scale, shift = torch.logspace(-3, 3, 16), 100.0
    train, val = (
        (centres[labels] + 0.1 * torch.randn(len(labels), 16, generator=generator)) * scale + shift for _ in range(2)
    )
    assert linear_accuracy(train, labels, val, labels, classes) == (100.0, 100.0)
    wrong = (labels + 1) % classes
    assert linear_accuracy(train, labels, val, wrong, classes)[0] == 0.0


def test_features_without_information_give_chance_accuracy():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(10).repeat(40)
    train, val = (torch.randn(400, 8, generator=generator) for _ in range(2))
    top1, top5 = linear_accuracy(train, labels, val, labels, 10)
    assert top1 < 20
    assert 35 < top5 < 65


def clouds(classes, images, noise):
    """Features around a centre for each class, and labels: float32 [images, 12], int64 [images]."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(images) % classes
    centres = torch.randn(classes, 12, generator=generator)
    return 3 + centres[labels] + noise * torch.randn(images, 12, generator=generator), labels


@pytest.mark.parametrize("chunk", [1 << 15, 17])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_objective_is_the_mean_cross_entropy_with_a_penalty_and_the_gradient_is_its_own(
    classes, chunk, monkeypatch
):
    monkeypatch.setattr(logistic, "CHUNK", chunk)
    features, labels = clouds(classes, 60, 1.0)
    mean, std = features.mean(0), features.std(0)
    layer = torch.randn(1 if classes == 2 else classes, 13, requires_grad=True)
    scores = (features - mean) / std @ layer[:, :-1].T + layer[:, -1]
    if classes == 2:
        scores = torch.cat([torch.zeros(60, 1), scores], dim=1)
    true = scores[torch.arange(60), labels]
    expected = (scores.exp().sum(1).log() - true).mean() + layer[:, :-1].square().sum() / (2 * 60)
    expected.backward()
    loss, gradient = objective(layer.detach(), features, labels, classes, mean, std)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(gradient, layer.grad, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 5])
def test_the_fit_for_a_gpu_gives_the_scores_of_scikit_learn(classes):
    features, labels = clouds(classes, 500, 2.0)
    train, val = features[:400], features[400:]
    mean, std = train.mean(0), train.std(0, correction=0)
    scores = scores_by_lbfgs(train, labels[:400], val, classes, mean, std)
    expected = scores_by_scikit_learn((train - mean) / std, labels[:400], (val - mean) / std)
    if classes == 2:  # scikit-learn gives the score of the second class, and here its opposite as the first one's
        scores, expected = scores[:, 1], expected[:, 1]
    else:  # a constant added to all scores of an image changes nothing
        scores, expected = (one - one.mean(1, keepdim=True) for one in (scores, expected))
    assert torch.allclose(scores, expected.float(), atol=2e-2)
    assert expected.std() > 1


def test_the_fit_stops_where_the_gradient_vanishes():
    features, labels = clouds(5, 400, 2.0)
    mean, std = features.mean(0), features.std(0, correction=0)
    layer = fit(features, labels, 5, mean, std)
    assert objective(layer, features, labels, 5, mean, std)[1].abs().max() <= logistic.TOLERANCE
    assert objective(torch.zeros_like(layer), features, labels, 5, mean, std)[1].abs().max() > 0.1

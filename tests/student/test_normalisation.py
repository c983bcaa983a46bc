"""Guidance normalisation against its formulas written out."""

import pytest
import torch

from fastmae.student.normalisation import EPSILON, StoreNorm, channel_norm, patch_norm, unchanged

FEATURES = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 4 + 2


def test_patch_norm_is_zero_mean_unit_variance_over_the_patches_of_each_channel():
    normalised = patch_norm(FEATURES)
    for b in range(3):
        for c in range(7):
            column = FEATURES[b, :, c]
            mean = sum(column) / 5
            variance = sum((column - mean) ** 2) / 5
            torch.testing.assert_close(normalised[b, :, c], (column - mean) / (variance + EPSILON) ** 0.5)


def test_channel_norm_is_zero_mean_unit_variance_over_the_channels_of_each_patch():
    normalised = channel_norm(FEATURES)
    for b in range(3):
        for n in range(5):
            patch = FEATURES[b, n]
            mean = sum(patch) / 7
            variance = sum((patch - mean) ** 2) / 7
            torch.testing.assert_close(normalised[b, n], (patch - mean) / (variance + EPSILON) ** 0.5)


def test_store_norm_uses_the_stores_mean_and_std():
    mean, std = torch.arange(7.0), torch.arange(1.0, 8.0)
    expected = (FEATURES - mean) / (std**2 + EPSILON) ** 0.5
    torch.testing.assert_close(StoreNorm(mean, std)(FEATURES), expected)


def test_no_normalisation_leaves_the_features_as_they_are():
    assert torch.equal(unchanged(FEATURES), FEATURES)


def test_constant_features_become_zeros_not_nan():
    for norm in (patch_norm, channel_norm):
        assert torch.equal(norm(torch.full((2, 4, 3), 7.0)), torch.zeros(2, 4, 3))
    assert torch.isfinite(StoreNorm(torch.zeros(3), torch.zeros(3))(torch.ones(1, 1, 3))).all()


NORMS = (patch_norm, channel_norm, StoreNorm(torch.arange(7.0), torch.arange(1.0, 8.0)), unchanged)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_in_half_precision_give_the_same_bits_as_their_fp32_copy(dtype, norm):
    features = FEATURES.to(dtype)
    before = features.clone()
    normalised = norm(features)
    assert normalised.dtype == torch.float32
    assert torch.equal(normalised, norm(features.float()))
    assert torch.equal(features, before)


@pytest.mark.parametrize("norm", NORMS)
def test_the_features_are_not_changed_in_place(norm):
    features = FEATURES.clone()
    norm(features)
    assert torch.equal(features, FEATURES)

"""Guidance normalisation and norm-pix against their formulas written out."""

import math

import pytest
import torch

from fastmae.errors import InputError
from fastmae.student.targets import (
    EPSILON,
    Hog,
    channel_norm,
    cut_views,
    hog,
    norm_pix,
    patch_norm,
    patchify,
    store_norm,
    unchanged,
)

F = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 4 + 2


def test_patch_norm_is_zero_mean_unit_variance_over_the_patches_of_each_channel():
    out = patch_norm(F)
    for b in range(3):
        for c in range(7):
            column = F[b, :, c]
            mean = sum(column) / 5
            variance = sum((column - mean) ** 2) / 5
            torch.testing.assert_close(out[b, :, c], (column - mean) / (variance + EPSILON) ** 0.5)


def test_channel_norm_is_zero_mean_unit_variance_over_the_channels_of_each_patch():
    out = channel_norm(F)
    for b in range(3):
        for n in range(5):
            patch = F[b, n]
            mean = sum(patch) / 7
            variance = sum((patch - mean) ** 2) / 7
            torch.testing.assert_close(out[b, n], (patch - mean) / (variance + EPSILON) ** 0.5)


def test_store_norm_uses_the_given_mean_and_deviation():
    mean, std = torch.arange(7.0), torch.arange(1.0, 8.0)
    torch.testing.assert_close(store_norm(mean, std)(F), (F - mean) / (std**2 + EPSILON) ** 0.5)
    assert torch.equal(unchanged(F), F)


def test_constant_features_become_zeros_not_nan():
    for norm in (patch_norm, channel_norm):
        assert torch.equal(norm(torch.full((2, 4, 3), 7.0)), torch.zeros(2, 4, 3))
    assert torch.isfinite(store_norm(torch.zeros(3), torch.zeros(3))(torch.ones(1, 1, 3))).all()


def test_patchify_is_row_by_row_with_colours_last():
    images = torch.arange(2 * 3 * 4 * 6).float().reshape(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for row in range(2):
        for col in range(3):
            cut = images[1, :, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
            assert torch.equal(patches[1, 3 * row + col], cut.permute(1, 2, 0).flatten())


def test_norm_pix_is_maes():
    images = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    patch = patchify(images, 2)[0, 3]
    mean = patch.sum() / 12
    variance = ((patch - mean) ** 2).sum() / 11
    torch.testing.assert_close(norm_pix(images, 2)[0, 3], (patch - mean) / (variance + 1e-6) ** 0.5)


def hog_of_a_cell(cell):
    """One colour's cell with a rim of one pixel, [10, 10]: votes counted pixel by pixel."""
    votes = [0.0] * 9
    for y in range(1, 9):
        for x in range(1, 9):
            across = float(cell[y, x + 1] - cell[y, x - 1])
            down = float(cell[y + 1, x] - cell[y - 1, x])
            degrees = math.degrees(math.atan2(down, across)) % 180
            votes[int(degrees // 20) % 9] += math.hypot(across, down)
    length = math.sqrt(sum(v * v for v in votes))
    return [v / length for v in votes]


def test_hog_counts_gradient_magnitudes_by_unsigned_orientation_in_cells_of_unit_norm():
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    out = hog(pixels, 16)
    assert out.shape == (2, 9, 4 * 27)
    for cell, (top, left) in enumerate(((0, 0), (0, 8), (8, 0), (8, 8))):  # of the patch in row 1, column 1
        for colour in range(3):
            cut = pixels[1, colour, 15 + top : 25 + top, 15 + left : 25 + left]
            part = out[1, 4, 27 * cell + 9 * colour : 27 * cell + 9 * colour + 9]
            torch.testing.assert_close(part, torch.tensor(hog_of_a_cell(cut)), atol=1e-5, rtol=1e-5)


def test_hog_of_a_ramp_votes_for_its_direction_and_of_a_flat_image_for_none():
    ramp = torch.arange(16.0).expand(1, 3, 16, 16)
    assert torch.equal(hog(ramp, 8)[0, 0].view(3, 9).argmax(1), torch.zeros(3, dtype=torch.long))  # across: 0 degrees
    down = hog(ramp.transpose(2, 3), 8)[0, 3].view(3, 9)
    assert torch.equal(down.argmax(1), torch.full((3,), 4))  # 90 degrees lie in the bin from 80 to 100
    assert torch.equal(hog(torch.ones(1, 3, 16, 16), 8), torch.zeros(1, 4, 27))
    torch.testing.assert_close(hog(5 * ramp + 3, 8), hog(ramp, 8))


def test_hog_needs_patches_of_whole_cells():
    assert Hog(16, unchanged).dims == (108,)
    with pytest.raises(InputError, match="whole cells of 8 px"):
        Hog(14, unchanged)


def test_cut_views_is_the_slice_of_each_image_mirrored_where_flipped():
    grids = torch.arange(2 * 5 * 5 * 1).reshape(2, 5, 5, 1)
    cut = cut_views(grids, torch.tensor([[1, 2, 0], [0, 1, 1]]), 3)
    assert torch.equal(cut[0, :, 0], grids[0, 1:4, 2:5, 0].flatten())
    assert torch.equal(cut[1, :, 0], grids[1, 0:3, 1:4, 0].flip(1).flatten())

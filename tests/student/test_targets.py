"""Pixel targets against their formulas written out, and views that are cut out of whole grids."""

import pytest
import torch
import torch.nn.functional as F

from fastmae.errors import InputError
from fastmae.student.normalisation import unchanged
from fastmae.student.targets import Hog, OnlineTokens, cut_views, norm_pix, patchify
from fastmae.tokens.loader import ViewBatch


def test_patchify_is_row_by_row_with_colours_last():
    images = torch.arange(2 * 3 * 4 * 6).float().reshape(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for row in range(2):
        for col in range(3):
            patch = images[1, :, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
            assert torch.equal(patches[1, 3 * row + col], patch.permute(1, 2, 0).flatten())


def test_norm_pix_is_maes():
    images = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    patch = patchify(images, 2)[0, 3]
    mean = patch.sum() / 12
    variance = ((patch - mean) ** 2).sum() / 11
    torch.testing.assert_close(norm_pix(images, 2)[0, 3], (patch - mean) / (variance + 1e-6) ** 0.5)


def test_hog_needs_patches_of_whole_cells():
    assert Hog(16, unchanged).dims == (108,)
    with pytest.raises(InputError, match="--target hog"):
        Hog(14, unchanged)


def test_a_cut_view_is_the_slice_of_its_grid_and_is_mirrored_if_flipped():
    grids = torch.arange(2 * 5 * 5 * 1).reshape(2, 5, 5, 1)
    views = cut_views(grids, torch.tensor([[1, 2, 0], [0, 1, 1]]), 3)
    assert torch.equal(views[0, :, 0], grids[0, 1:4, 2:5, 0].flatten())
    assert torch.equal(views[1, :, 0], grids[1, 0:3, 1:4, 0].flip(1).flatten())


class MeanColours:
    """A teacher whose features are the mean colours of 8 x 8 patches: it gives a mirrored image the mirrored grid."""

    token_dim, grid = 3, 6

    def __call__(self, pixels):
        return F.avg_pool2d(pixels.float(), 8).permute(0, 2, 3, 1)


def test_mirroring_the_image_or_the_grid_gives_the_same_tokens_if_the_teacher_commutes_with_flips():
    middle = torch.randint(0, 256, (3, 3, 48, 48), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    crop = torch.tensor([[1, 2, 0], [0, 1, 1], [3, 3, 1]])
    views = torch.empty(0)
    batch = ViewBatch(views, [], [], views, crop, middle)
    by_grid, by_image = (
        OnlineTokens([MeanColours()], [unchanged], 3, exact_flips=exact_flips)(batch, views)
        for exact_flips in (False, True)
    )
    assert by_grid.shape == (3, 9, 3)
    torch.testing.assert_close(by_grid, by_image)

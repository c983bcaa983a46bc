"""Pixel targets against their formulas written out, and views that are cut out of whole grids."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastmae.errors import InputError
from fastmae.images.views import PixelScale
from fastmae.student.normalisation import patch_norm, unchanged
from fastmae.student.targets import Hog, NormPix, OnlineTokens, StoredTokens, cut_views, norm_pix
from fastmae.tokens.codec import load_codec
from fastmae.tokens.loader import ViewBatch


def test_norm_pix_is_maes_with_a_patchs_pixels_row_by_row_and_colours_last():
    patches = torch.randn(1, 3, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    normed = norm_pix(patches)
    values = torch.stack([patches[0, 1, colour, y, x] for y in range(2) for x in range(2) for colour in range(3)])
    mean = values.sum() / 12
    variance = ((values - mean) ** 2).sum() / 11
    torch.testing.assert_close(normed[0, 1], (values - mean) / (variance + 1e-6) ** 0.5)


@pytest.mark.parametrize("target", [NormPix(8, 3), Hog(8, patch_norm)])
def test_a_target_made_from_pixels_comes_in_shuffled_order(target):
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    shuffled = torch.stack([torch.randperm(16, generator=generator) for _ in range(2)])
    pixel_scale = PixelScale((0.5,) * 3, (0.5,) * 3)
    in_order, in_shuffled_order = (
        target(SimpleNamespace(pixels=pixels, ids_shuffle=ids), pixel_scale)
        for ids in (torch.arange(16).expand(2, -1), shuffled)
    )
    assert torch.equal(in_shuffled_order, torch.stack([in_order[b, shuffled[b]] for b in range(2)]))


def test_stored_tokens_are_decoded_and_normed_in_shuffled_order():
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(2, 9, 5, generator=generator)
    shuffled = torch.stack([torch.randperm(9, generator=generator) for _ in range(2)])
    batch = SimpleNamespace(tokens=[tokens], means=[torch.empty(2, 0)], ids_shuffle=shuffled)
    target = StoredTokens([load_codec("fp32", 5, {})], [patch_norm])(batch, PixelScale((0.5,), (0.5,)))
    expected = patch_norm(tokens)
    torch.testing.assert_close(target, torch.stack([expected[b, shuffled[b]] for b in range(2)]))


@pytest.mark.parametrize("norm", [patch_norm, unchanged])
def test_fp16_tokens_give_the_target_of_their_fp32_copies_in_fp32(norm):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(2, 9, 5, generator=generator).half()
    shuffled = torch.stack([torch.randperm(9, generator=generator) for _ in range(2)])
    targets = [
        StoredTokens([load_codec(name, 5, {})], [norm])(
            SimpleNamespace(tokens=[stored], means=[torch.empty(2, 0)], ids_shuffle=shuffled),
            PixelScale((0.5,), (0.5,)),
        )
        for name, stored in (("fp16", tokens), ("fp32", tokens.float()))
    ]
    assert targets[0].dtype == torch.float32
    assert torch.equal(*targets)


def test_hog_needs_patches_of_whole_cells():
    assert Hog(16, unchanged).dims == (108,)
    with pytest.raises(InputError, match="--target hog"):
        Hog(14, unchanged)


def test_a_cut_view_is_the_slice_of_its_grid_and_is_mirrored_if_flipped():
    grids = torch.arange(2 * 5 * 5 * 1).reshape(2, 5, 5, 1)
    in_order = torch.arange(9).expand(2, -1)
    views = cut_views(grids, torch.tensor([[1, 2, 0], [0, 1, 1]]), 3, in_order)
    assert torch.equal(views[0, :, 0], grids[0, 1:4, 2:5, 0].flatten())
    assert torch.equal(views[1, :, 0], grids[1, 0:3, 1:4, 0].flip(1).flatten())
    some = torch.tensor([[4, 0], [8, 3]])
    assert torch.equal(
        cut_views(grids, torch.tensor([[1, 2, 0], [0, 1, 1]]), 3, some),
        torch.stack([views[0, [4, 0]], views[1, [8, 3]]]),
    )


class MeanColours:
    """A teacher whose features are the mean colours of 8 x 8 patches: it gives a mirrored image the mirrored grid."""

    token_dim, grid = 3, 6

    def __call__(self, pixels):
        return F.avg_pool2d(pixels.float(), 8).permute(0, 2, 3, 1)


def test_mirroring_the_image_or_the_grid_gives_the_same_tokens_if_the_teacher_commutes_with_flips():
    middle = torch.randint(0, 256, (3, 3, 48, 48), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    crop = torch.tensor([[1, 2, 0], [0, 1, 1], [3, 3, 1]])
    views = torch.empty(0)
    batch = ViewBatch(views, [], [], torch.arange(9).expand(3, -1), crop, middle)
    by_grid, by_image = (
        OnlineTokens([MeanColours()], [unchanged], 3, exact_flips=exact_flips)(
            batch, PixelScale((0.5,) * 3, (0.5,) * 3)
        )
        for exact_flips in (False, True)
    )
    assert by_grid.shape == (3, 9, 3)
    torch.testing.assert_close(by_grid, by_image)

import numpy as np
import pytest
import torch

from fastmae.bench.counting import Counts
from fastmae.images.views import IMAGENET_MEAN, IMAGENET_STD, PixelScale, ViewDraws, normalise


def draw_view(seed, epoch, index, grid, size, flip, mask="random"):
    return ViewDraws(size, flip, mask, size * size // 4, seed).draw(epoch, index, [grid])


def test_every_aligned_offset_is_drawn_equally_often_and_half_of_the_views_are_flipped():
    draws = [draw_view(seed=1, epoch=0, index=i, grid=6, size=4, flip=True) for i in range(9000)]
    counts = np.zeros((3, 3))
    for draw in draws:
        counts[draw.row, draw.col] += 1
    assert abs(counts - 1000).max() < 150  # 5 standard deviations of a binomial
    assert abs(np.mean([draw.flipped for draw in draws]) - 0.5) < 0.03


def test_a_draw_depends_only_on_seed_epoch_and_index():
    first = draw_view(3, 5, 7, 22, 14, True)
    again = draw_view(3, 5, 7, 22, 14, True)
    assert (first.row, first.col, first.flipped) == (again.row, again.col, again.flipped)
    assert (first.ids_shuffle == again.ids_shuffle).all()
    others = [draw_view(*key, 22, 14, True).ids_shuffle for key in ((4, 5, 7), (3, 6, 7), (3, 5, 8))]
    assert not any((other == first.ids_shuffle).all() for other in others)


@pytest.mark.parametrize("grid", [14, 15, 22, 37, 300])
def test_draws_are_those_of_numpys_generator_seeded_with_the_tuple(grid):
    for key in ((0, 0, 0), (5, 3, 1_281_166), (2**31 - 1, 70_000, 2**31 - 2), *((1, 2, i) for i in range(50))):
        draw, rng = draw_view(*key, grid, 14, True), np.random.default_rng(key)
        assert [draw.row, draw.col] == rng.integers(0, grid - 14 + 1, size=2).tolist()
        assert draw.flipped == (rng.random() < 0.5)
        assert (draw.ids_shuffle == rng.permutation(196)).all()


def test_ids_shuffle_is_a_permutation_and_every_patch_is_visible_equally_often():
    visible = np.zeros(16)
    for index in range(4000):
        ids_shuffle = draw_view(0, 0, index, 4, 4, False).ids_shuffle
        assert sorted(ids_shuffle) == list(range(16))
        visible[ids_shuffle[:4]] += 1
    assert abs(visible - 1000).max() < 140


def test_a_block_mask_has_the_exact_ratio_and_fewer_borders_than_a_random_mask():
    def borders(ids_shuffle):
        masked = np.ones(196, dtype=bool)
        masked[ids_shuffle[:49]] = False
        masked = masked.reshape(14, 14)
        return (masked[1:] != masked[:-1]).sum() + (masked[:, 1:] != masked[:, :-1]).sum()

    blocks, scattered = (
        [draw_view(0, 0, i, 14, 14, False, mask).ids_shuffle for i in range(200)] for mask in ("block", "random")
    )
    assert all(sorted(ids_shuffle) == list(range(196)) for ids_shuffle in blocks)
    assert np.mean([borders(ids_shuffle) for ids_shuffle in blocks]) < 0.6 * np.mean(
        [borders(ids_shuffle) for ids_shuffle in scattered]
    )
    visible = np.zeros(196)
    for ids_shuffle in blocks:
        visible[ids_shuffle[:49]] += 1
    assert (visible > 0).all()  # every patch is visible in some view
    again = draw_view(0, 0, 3, 14, 14, False, "block").ids_shuffle
    assert (again == blocks[3]).all()


def test_every_scale_is_drawn_equally_often():
    draws = ViewDraws(4, True, "random", 4, seed=0)
    drawn = [draws.draw(0, index, (4, 6, 9)) for index in range(3000)]
    assert np.bincount([d.scale for d in drawn]).tolist() == pytest.approx([1000, 1000, 1000], abs=130)
    assert max(d.row for d in drawn if d.scale == 2) == 5
    assert all((d.row, d.col) == (0, 0) for d in drawn if d.scale == 0)


def test_without_flip_no_view_is_flipped():
    assert not any(draw_view(0, 0, index, 8, 4, False).flipped for index in range(50))


def test_normalise_uses_imagenets_mean_and_std_by_default():
    grey = normalise(torch.full((3, 1, 1), 255, dtype=torch.uint8))[:, 0, 0]
    torch.testing.assert_close(grey, (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]))


def test_normalise_does_not_depend_on_the_memory_layout():
    pixels = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    channels_last = pixels.to(memory_format=torch.channels_last)
    assert torch.equal(normalise(channels_last), normalise(pixels))
    assert normalise(channels_last).is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(normalise(channels_last), (pixels / 255 - mean) / std)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 4, 3, 2, 2)])
def test_pixels_are_normalised_in_fp32_and_rounded_once_to_autocasts_dtype(shape):
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    layouts = [pixels] if len(shape) > 4 else [pixels, pixels.to(memory_format=torch.channels_last)]
    pixel_scale = PixelScale(IMAGENET_MEAN, IMAGENET_STD)
    for stored in layouts:
        normalised = pixel_scale(stored)
        assert (normalised.dtype, normalised.stride()) == (torch.float32, stored.stride())
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                rounded = pixel_scale(stored)
            assert rounded.dtype == dtype
            rtol = 0.51 * torch.finfo(dtype).eps
            torch.testing.assert_close(rounded.float(), normalised, rtol=rtol, atol=1e-6)


def test_under_autocast_pixels_are_normalised_in_one_pass():
    pixels, pixel_scale = torch.zeros(2, 4, 3, 2, 2, dtype=torch.uint8), PixelScale(IMAGENET_MEAN, IMAGENET_STD)
    with Counts() as counts, torch.autocast("cpu", torch.bfloat16):
        pixel_scale(pixels)
    assert dict(counts.bytes) == {"addcmul": (1 + 2) * pixels.numel() + 2 * 3 * 4}

import pytest
import torch

from fastmae.evaluate.segmentation import augment as module
from fastmae.evaluate.segmentation.augment import (
    Augmentation,
    distort_colours,
    draw_crop,
    fitted_size,
    largest_share,
    padded,
    resized,
)
from fastmae.runtime.seeding import drawn_from

FILL = (124, 116, 104)


def blocks(height=96, width=144, side=16):
    """A mask of blocks of the classes 0 and 1, and a photo in which they are black and light."""
    ids = torch.randint(
        0, 2, (height // side, width // side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    mask = ids.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return (200 * mask)[None].repeat(3, 1, 1), mask


def test_photo_and_mask_stay_aligned_through_scale_crop_flip_and_padding(monkeypatch):
    monkeypatch.setattr(module, "distort_colours", lambda image: image)
    image, mask = blocks()
    augment = Augmentation(crop=64, short_side=80, fill=FILL)
    agreeing = []
    for seed in range(40):
        with drawn_from(seed):
            crop, ids = augment(image, mask)
        assert (crop.shape, ids.shape, crop.dtype, ids.dtype) == ((3, 64, 64), (64, 64), torch.uint8, torch.uint8)
        inside = ids != 255
        assert (crop[:, ~inside] == torch.tensor(FILL, dtype=torch.uint8)[:, None]).all()
        agreeing.append(((crop[0] > 100) == (ids == 1))[inside].float().mean())
    assert min(agreeing) > 0.97  # all but the blocks' corners; a pixel of misalignment would cost 3 to 12 %


def test_pixels_and_ids_are_resized_on_the_same_grid():
    mask = torch.zeros(40, 40, dtype=torch.uint8)
    mask[:, 20:] = 1
    image, ids = resized((200 * mask)[None], mask, (28, 28))
    wrong = (image[0] > 100) != (ids == 1)
    assert not wrong.any()
    image, ids = resized((200 * mask)[None], mask, (90, 90))
    assert not ((image[0] > 100) != (ids == 1)).any()


def test_a_visit_is_drawn_from_its_seed_alone_and_each_differs():
    image, mask = blocks()
    augment = Augmentation(crop=64, short_side=64, fill=FILL)

    def drawn(*seed):
        with drawn_from(*seed):
            return augment(image, mask)

    first = drawn(0, 3, 7)
    torch.rand(5)
    again, other = drawn(0, 3, 7), drawn(0, 4, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_scales_go_from_a_half_to_twice_and_half_of_the_crops_are_mirrored(monkeypatch):
    seen, flips = [], []
    monkeypatch.setattr(module, "resized", lambda image, mask, size: (seen.append(size), resized(image, mask, size))[1])
    monkeypatch.setattr(module, "horizontal_flip", lambda part: (flips.append(part.dim()), part.flip(-1))[1])
    image, mask = blocks(32, 64, 8)
    for seed in range(200):
        with drawn_from(seed):
            Augmentation(crop=32, short_side=64, fill=FILL)(image, mask)
    heights = torch.tensor([size[0] for size in seen]) / 64
    assert 0.5 <= heights.min() < 0.55
    assert 1.95 < heights.max() <= 2.0
    assert abs(heights.mean() - 1.25) < 0.1
    assert all(abs(width - 2 * height) <= 1 for height, width in seen)
    assert 80 < flips.count(2) < 120
    assert flips.count(2) == flips.count(3)


def test_fitted_size_brings_the_short_side_there_and_bounds_the_long_one():
    assert fitted_size((480, 640), 512) == (512, 683)
    assert fitted_size((640, 480), 512) == (683, 512)
    assert fitted_size((100, 1000), 512) == (205, 2048)
    assert fitted_size((123, 45), 0) == (123, 45)


def test_a_crop_that_one_class_fills_is_drawn_again():
    mask = torch.zeros(64, 256, dtype=torch.uint8)
    mask[:, 200:] = torch.arange(64, dtype=torch.uint8)[:, None] // 8 + 1
    shares = []
    for seed in range(60):
        torch.manual_seed(seed)
        top, left = draw_crop(mask, 64)
        shares.append(largest_share(mask[top : top + 64, left : left + 64]))
    once = 1 - (256 - 64 - 152) / (256 - 64 + 1)  # a single draw fails so often: left must be 152 or more
    assert sum(share >= 0.75 for share in shares) / 60 < once**4


def test_the_largest_share_counts_no_ignored_pixel():
    mask = torch.tensor([[0, 0, 0, 1], [255, 255, 255, 255]], dtype=torch.uint8)
    assert largest_share(mask) == 0.75
    assert largest_share(torch.full((2, 2), 255, dtype=torch.uint8)) == 1.0


def test_what_lies_outside_a_small_photo_is_ignored():
    image, mask = blocks(32, 48)
    filled, ids = padded(image, mask, 64, FILL)
    assert torch.equal(filled[:, :32, :48], image)
    assert torch.equal(ids[:32, :48], mask)
    assert (ids[32:] == 255).all()
    assert (ids[:, 48:] == 255).all()
    assert filled[:, 40, 60].tolist() == list(FILL)


@pytest.mark.parametrize(("channels", "changes"), [(1, True), (3, True), (4, False)])
def test_colours_are_distorted_in_most_photos_but_not_the_bands_of_other_images(channels, changes):
    torch.manual_seed(0)
    image = torch.randint(0, 256, (channels, 16, 16), dtype=torch.uint8)
    distorted = [distort_colours(image) for _ in range(30)]
    assert all(part.shape == image.shape and part.dtype == torch.uint8 for part in distorted)
    assert (sum(not torch.equal(part, image) for part in distorted) > 15) == changes

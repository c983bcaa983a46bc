import pytest
import torch

from fastmae.evaluate.segmentation import augment
from fastmae.evaluate.segmentation.augment import (
    Augmentation,
    distort_colours,
    draw_crop,
    largest_class_share,
    pad_to,
    resize_pair,
    size_for_short_side,
)
from fastmae.runtime.seeding import drawn_from

FILL = (124, 116, 104)


def block_pair(height=96, width=144, side=16):
    """A photo and a mask of blocks of class 0, which are black, and of class 1, which are light."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2, (height // side, width // side), generator=generator, dtype=torch.uint8)
    mask = ids.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return (200 * mask)[None].repeat(3, 1, 1), mask


def test_photo_and_mask_stay_aligned_through_scale_crop_flip_and_padding(monkeypatch):
    monkeypatch.setattr(augment, "distort_colours", lambda image: image)
    image, mask = block_pair()
    make_crop = Augmentation(crop=64, short_side=80, fill=FILL)
    aligned_shares = []
    for seed in range(40):
        with drawn_from(seed):
            crop, ids = make_crop(image, mask)
        assert (crop.shape, ids.shape, crop.dtype, ids.dtype) == ((3, 64, 64), (64, 64), torch.uint8, torch.uint8)
        inside = ids != 255
        assert (crop[:, ~inside] == torch.tensor(FILL, dtype=torch.uint8)[:, None]).all()
        aligned_shares.append(((crop[0] > 100) == (ids == 1))[inside].float().mean())
    assert min(aligned_shares) > 0.97  # all but the blocks' corners; an offset of one pixel would cost 3 to 12 %


@pytest.mark.parametrize("side", [28, 90])
def test_photo_and_mask_are_resized_on_the_same_grid(side):
    mask = torch.zeros(40, 40, dtype=torch.uint8)
    mask[:, 20:] = 1
    image, ids = resize_pair((200 * mask)[None], mask, (side, side))
    assert torch.equal(image[0] > 100, ids == 1)


def test_a_crop_follows_from_its_seed_alone_and_other_seeds_give_other_crops():
    image, mask = block_pair()
    make_crop = Augmentation(crop=64, short_side=64, fill=FILL)

    def crop_drawn_from(*seed):
        with drawn_from(*seed):
            return make_crop(image, mask)

    first = crop_drawn_from(0, 3, 7)
    torch.rand(5)
    again, other = crop_drawn_from(0, 3, 7), crop_drawn_from(0, 4, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_scales_are_uniform_from_half_to_twice_and_half_of_the_crops_are_flipped(monkeypatch):
    sizes, flipped_dims = [], []

    def recording_resize(image, mask, size):
        sizes.append(size)
        return resize_pair(image, mask, size)

    def recording_flip(tensor):
        flipped_dims.append(tensor.dim())
        return tensor.flip(-1)

    monkeypatch.setattr(augment, "resize_pair", recording_resize)
    monkeypatch.setattr(augment, "horizontal_flip", recording_flip)
    image, mask = block_pair(32, 64, 8)
    for seed in range(200):
        with drawn_from(seed):
            Augmentation(crop=32, short_side=64, fill=FILL)(image, mask)
    scales = torch.tensor([height for height, _ in sizes]) / 64
    assert 0.5 <= scales.min() < 0.55
    assert 1.95 < scales.max() <= 2.0
    assert abs(scales.mean() - 1.25) < 0.1
    assert all(abs(width - 2 * height) <= 1 for height, width in sizes)
    assert 80 < flipped_dims.count(2) < 120
    assert flipped_dims.count(2) == flipped_dims.count(3)


def test_the_short_side_is_reached_unless_the_long_side_becomes_too_long():
    assert size_for_short_side((480, 640), 512) == (512, 683)
    assert size_for_short_side((640, 480), 512) == (683, 512)
    assert size_for_short_side((100, 1000), 512) == (205, 2048)
    assert size_for_short_side((123, 45), 0) == (123, 45)


def test_a_crop_that_one_class_fills_is_drawn_again():
    mask = torch.zeros(64, 256, dtype=torch.uint8)
    mask[:, 200:] = torch.arange(64, dtype=torch.uint8)[:, None] // 8 + 1
    shares = []
    for seed in range(60):
        torch.manual_seed(seed)
        top, left = draw_crop(mask, 64)
        shares.append(largest_class_share(mask[top : top + 64, left : left + 64]))
    lefts = 256 - 64 + 1
    chance_to_fail_once = 152 / lefts  # of a single draw: a left below 152 shows too much of class 0
    assert sum(share >= 0.75 for share in shares) / 60 < chance_to_fail_once**4


def test_ignored_pixels_do_not_count_for_the_largest_share():
    mask = torch.tensor([[0, 0, 0, 1], [255, 255, 255, 255]], dtype=torch.uint8)
    assert largest_class_share(mask) == 0.75
    assert largest_class_share(torch.full((2, 2), 255, dtype=torch.uint8)) == 1.0


def test_what_lies_outside_a_small_photo_is_filled_and_ignored():
    image, mask = block_pair(32, 48)
    padded, ids = pad_to(64, image, mask, FILL)
    assert torch.equal(padded[:, :32, :48], image)
    assert torch.equal(ids[:32, :48], mask)
    assert (ids[32:] == 255).all()
    assert (ids[:, 48:] == 255).all()
    assert padded[:, 40, 60].tolist() == list(FILL)


@pytest.mark.parametrize(("channels", "changes"), [(1, True), (3, True), (4, False)])
def test_colours_are_distorted_in_most_grey_and_rgb_photos_and_in_no_others(channels, changes):
    torch.manual_seed(0)
    image = torch.randint(0, 256, (channels, 16, 16), dtype=torch.uint8)
    distorted = [distort_colours(image) for _ in range(30)]
    assert all(result.shape == image.shape and result.dtype == torch.uint8 for result in distorted)
    assert (sum(not torch.equal(result, image) for result in distorted) > 15) == changes

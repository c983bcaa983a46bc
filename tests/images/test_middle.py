import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.images import jpeg
from fastmae.images.middle import make_middle_image, resized_pixels


def middle_of(path, size, resize, quality):
    with path.open("rb") as file:
        return make_middle_image(file, path.name, size, resize, quality)


@pytest.fixture
def picture(photos):
    return photos / "train" / "china" / "01.png"


@pytest.mark.parametrize("quality", [None, 90])
def test_a_middle_image_has_the_middle_size_and_keeps_the_original_size(picture, quality):
    middle = middle_of(picture, 96, "whole", quality)
    assert middle.pixels.shape == (3, 96, 96)
    assert middle.pixels.dtype == torch.uint8
    assert (middle.width, middle.height) == Image.open(picture).size


def test_the_pixels_for_the_teacher_are_those_that_the_jpeg_decodes_to(picture):
    middle = middle_of(picture, 96, "whole", 80)
    assert np.array_equal(jpeg.decode(middle.jpeg.numpy(), 3), middle.pixels.numpy())
    raw = middle_of(picture, 96, "whole", None).pixels
    assert not torch.equal(raw, middle.pixels)
    assert (raw.int() - middle.pixels.int()).abs().float().mean() < 6


def test_whole_distorts_and_center_crop_cuts(tmp_path):
    stripes = np.zeros((50, 100, 3), np.uint8)
    stripes[:, 50:] = 255  # left half black, right half white
    stripes[:, :10, 0] = 255  # a red edge
    Image.fromarray(stripes).save(tmp_path / "x.png")
    whole = middle_of(tmp_path / "x.png", 40, "whole", None).pixels
    cropped = middle_of(tmp_path / "x.png", 40, "center-crop", None).pixels
    assert whole[0, :, 0].float().mean() > 200  # the red edge is there
    assert cropped[0, :, 0].float().mean() < 20  # the red edge is cut off
    assert (whole[:, :, :18].float().mean() < 90) and (whole[:, :, 22:].float().mean() > 240)
    assert (cropped[:, :, :18].float().mean() < 10) and (cropped[:, :, 22:].float().mean() > 240)


def test_resized_pixels_are_those_of_a_raw_middle_image(picture):
    with picture.open("rb") as file:
        pixels, (width, height) = resized_pixels(file, picture.name, 96, "center-crop", 3)
    middle = middle_of(picture, 96, "center-crop", None)
    assert torch.equal(pixels, middle.pixels)
    assert (width, height) == (middle.width, middle.height)

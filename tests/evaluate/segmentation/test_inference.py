import pytest
import timm
import torch
import torch.nn.functional as F

from fastmae.evaluate.segmentation.inference import resize_scores, sliding_scores, stride_of, whole_scores
from fastmae.evaluate.segmentation.upernet import UperNet


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 32, "patch_size": 8}
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, **sizes)
    return UperNet(encoder, num_classes=3, head_channels=16).eval()


@pytest.mark.parametrize("size", [(32, 32), (20, 45), (48, 31), (5, 9)])
def test_a_window_that_covers_the_image_gives_the_scores_of_the_whole(network, size):
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(sliding_scores(network, images, 8, 48), whole_scores(network, images, 8))


def test_the_stride_is_two_thirds_of_the_window():
    assert stride_of(512) == 341


@pytest.mark.parametrize("size", [(48, 48), (33, 70), (20, 65), (16, 16)])
def test_windows_cover_every_pixel_and_are_averaged(size):
    """Compared with a plain loop. This network's scores are its window's mean, so each window shows in the result."""

    def mean_of_window(images):
        scores = images.mean((2, 3), keepdim=True).expand(-1, -1, images.shape[2] // 4, images.shape[3] // 4)
        return scores, images

    images, window, stride = torch.randn(1, 2, *size), 24, 16
    total, coverage = torch.zeros_like(images), torch.zeros_like(images)
    tops, lefts = (
        [min(start, max(side - window, 0)) for start in range(0, max(side - window, 0) + stride, stride)]
        for side in size
    )
    for top in dict.fromkeys(tops):
        for left in dict.fromkeys(lefts):
            crop = images[..., top : top + window, left : left + window]
            height, width = (-(-side // 8) * 8 for side in crop.shape[2:])
            padded = F.pad(crop, (0, width - crop.shape[3], 0, height - crop.shape[2]))
            total[..., top : top + window, left : left + window] += padded.mean((2, 3), keepdim=True)
            coverage[..., top : top + window, left : left + window] += 1
    assert coverage.min() >= 1
    torch.testing.assert_close(sliding_scores(mean_of_window, images, 8, window), total / coverage)


def test_an_image_is_padded_to_whole_patches_and_its_scores_are_cropped_back():
    inputs = []

    def network(images):
        inputs.append(images)
        return images[..., ::4, ::4], images

    images = torch.randn(1, 3, 21, 30)
    scores = whole_scores(network, images, 8)
    torch.testing.assert_close(inputs[0], F.pad(images, (0, 2, 0, 3)))
    resized = F.interpolate(inputs[0][..., ::4, ::4], size=(24, 32), mode="bilinear")
    torch.testing.assert_close(scores, resized[..., :21, :30])


def test_a_tiny_image_is_padded_to_two_patches_a_side():
    inputs = []

    def network(images):
        inputs.append(images)
        return images, images

    whole_scores(network, torch.ones(1, 3, 3, 5), 8)
    assert inputs[0].shape == (1, 3, 16, 16)


def test_scores_are_resized_in_float32():
    scores = torch.randn(1, 4, 10, 20, dtype=torch.bfloat16)
    resized = resize_scores(scores, (33, 41))
    assert (resized.dtype, resized.shape) == (torch.float32, (1, 4, 33, 41))
    torch.testing.assert_close(resized, F.interpolate(scores.float(), size=(33, 41), mode="bilinear"))

import pytest
import timm
import torch
import torch.nn.functional as F

from fastmae.evaluate.segmentation.inference import enlarged, sliding_scores, stride_of, whole_scores
from fastmae.evaluate.segmentation.upernet import UperNet


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 32, "patch_size": 8}
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, **sizes)
    return UperNet(encoder, classes=3, head_channels=16).eval()


@pytest.mark.parametrize("size", [(32, 32), (20, 45), (48, 31), (5, 9)])
def test_sliding_equals_the_whole_where_the_window_covers_the_image(network, size):
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(sliding_scores(network, images, 8, 48), whole_scores(network, images, 8))


def test_the_stride_is_two_thirds_of_the_window():
    assert stride_of(512) == 341


@pytest.mark.parametrize("size", [(48, 48), (33, 70), (20, 65), (16, 16)])
def test_windows_cover_every_pixel_and_are_averaged(size):
    """Against a plain loop; the network here tells only its window's mean, so what a window saw shows."""

    def telling(images):
        return images.mean((2, 3), keepdim=True).expand(-1, -1, images.shape[2] // 4, images.shape[3] // 4), images

    images, window, stride = torch.randn(1, 2, *size), 24, 16
    total, count = torch.zeros_like(images), torch.zeros_like(images)
    starts = [
        [min(first, max(length - window, 0)) for first in range(0, max(length - window, 0) + stride, stride)]
        for length in size
    ]
    for top in dict.fromkeys(starts[0]):
        for left in dict.fromkeys(starts[1]):
            part = images[..., top : top + window, left : left + window]
            rows, cols = (-(-side // 8) * 8 for side in part.shape[2:])
            mean = F.pad(part, (0, cols - part.shape[3], 0, rows - part.shape[2])).mean((2, 3), keepdim=True)
            total[..., top : top + window, left : left + window] += mean
            count[..., top : top + window, left : left + window] += 1
    assert count.min() >= 1
    torch.testing.assert_close(sliding_scores(telling, images, 8, window), total / count)


def test_an_image_is_filled_up_to_whole_patches_and_its_scores_cut_back():
    seen = []

    def network(images):
        seen.append(images)
        return images[..., ::4, ::4], images

    images = torch.randn(1, 3, 21, 30)
    scores = whole_scores(network, images, 8)
    torch.testing.assert_close(seen[0], F.pad(images, (0, 2, 0, 3)))
    given = F.interpolate(seen[0][..., ::4, ::4], size=(24, 32), mode="bilinear")
    torch.testing.assert_close(scores, given[..., :21, :30])
    whole_scores(network, torch.ones(1, 3, 3, 5), 8)
    assert seen[1].shape == (1, 3, 16, 16)


def test_scores_are_brought_to_the_masks_size():
    scores = torch.randn(1, 4, 10, 20, dtype=torch.bfloat16)
    found = enlarged(scores, (33, 41))
    assert (found.dtype, found.shape) == (torch.float32, (1, 4, 33, 41))
    torch.testing.assert_close(found, F.interpolate(scores.float(), size=(33, 41), mode="bilinear"))

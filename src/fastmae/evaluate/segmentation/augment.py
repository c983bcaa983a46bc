"""Random training crops of a photo and its mask: scale, crop, flip, colours.

The recipe is that of MAE's and BEiT's UperNet on ADE20K. Scale, crop and flip treat photo and mask alike. All draws
come from torch's global generator.

Shapes: K channels, H x W pixels of the photo, S the crop's side.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import horizontal_flip, resize

from fastmae.evaluate.segmentation.masks import IGNORED

SCALES = (0.5, 2.0)
"""Range of the random scale."""
MAX_CLASS_SHARE = 0.75
"""A crop is drawn again if one class takes this share of it or more (mmsegmentation's `cat_max_ratio`)."""
MAX_TRIES = 10
"""How often a crop is drawn at most."""
MAX_ASPECT = 4
"""A photo's longer side is resized to at most this many times the short side: 2048 for 512."""


@dataclass(frozen=True)
class Augmentation:
    """Makes a random crop of a photo and its mask.

    Attributes:
        crop: S, the crop's side, in pixels.
        short_side: length of the photo's shorter side before the random scale, in pixels; 0 keeps its own size.
        fill: the grey level of each channel outside a photo that is smaller than the crop.
    """

    crop: int
    short_side: int
    fill: tuple[int, ...]

    def __call__(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [K, H, W] and uint8 [H, W] -> uint8 [K, S, S] and uint8 [S, S]."""
        height, width = size_for_short_side((mask.shape[0], mask.shape[1]), self.short_side)
        scale = float(torch.empty(()).uniform_(*SCALES))
        image, mask = resize_pair(image, mask, (max(1, round(height * scale)), max(1, round(width * scale))))
        top, left = draw_crop(mask, self.crop)
        rows, cols = slice(top, top + self.crop), slice(left, left + self.crop)
        image, mask = image[:, rows, cols], mask[rows, cols]
        if torch.rand(()) < 0.5:
            image, mask = horizontal_flip(image), horizontal_flip(mask)
        return pad_to(self.crop, distort_colours(image), mask, self.fill)


def size_for_short_side(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(height, width) at which the shorter side is `short_side`, unless the longer one exceeds `MAX_ASPECT` times that.

    A short side of 0 gives the size as it is.
    """
    if not short_side:
        return size
    height, width = size
    scale = min(short_side / min(height, width), MAX_ASPECT * short_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize_pair(image: torch.Tensor, mask: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Photo and mask at another (height, width), on the same grid of pixel centres; ids are the nearest pixel's."""
    if tuple(mask.shape) == size:
        return image, mask
    image = resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)
    return image, resize(mask[None], list(size), InterpolationMode.NEAREST_EXACT)[0]


def draw_crop(mask: torch.Tensor, side: int) -> tuple[int, int]:
    """Top and left of a crop in which no class takes `MAX_CLASS_SHARE` or more, or of the last of `MAX_TRIES`."""
    height, width = mask.shape
    top = left = 0
    for _ in range(MAX_TRIES):
        top, left = (int(torch.randint(max(length - side, 0) + 1, ())) for length in (height, width))
        if largest_class_share(mask[top : top + side, left : left + side]) < MAX_CLASS_SHARE:
            break
    return top, left


def largest_class_share(mask: torch.Tensor) -> float:
    """The most frequent class's share of the pixels that are not ignored; 1 if all are ignored."""
    counts = torch.bincount(mask.flatten(), minlength=IGNORED + 1)[:IGNORED]
    return float(counts.max() / counts.sum()) if counts.any() else 1.0


def distort_colours(image: torch.Tensor) -> torch.Tensor:
    """Random brightness, contrast, saturation and hue, each in half of the photos. (mmsegmentation's)

    Contrast comes before or after saturation and hue, at random. A grey image has only brightness and contrast.

    Args:
        image: uint8 [K, H, W]; returned as it is if K is neither 1 nor 3.
    """
    if image.shape[0] not in (1, 3):
        return image
    brightness = _half_the_time(v2.ColorJitter(brightness=32 / 255))
    contrast = _half_the_time(v2.ColorJitter(contrast=0.5))
    colours = []
    if image.shape[0] == 3:
        colours = [_half_the_time(v2.ColorJitter(saturation=0.5)), _half_the_time(v2.ColorJitter(hue=0.1))]
    contrast_first = torch.rand(()) < 0.5
    transforms = [brightness, contrast, *colours] if contrast_first else [brightness, *colours, contrast]
    for transform in transforms:
        image = transform(image)
    return image


def _half_the_time(transform: v2.Transform) -> v2.Transform:
    return v2.RandomApply([transform], p=0.5)


def pad_to(
    side: int, image: torch.Tensor, mask: torch.Tensor, fill: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Photo and mask padded to `side` on the right and below, with the fill and with `IGNORED`."""
    height, width = mask.shape
    if height == width == side:
        return image, mask
    canvas = torch.tensor(fill, dtype=torch.uint8)[:, None, None].repeat(1, side, side)
    canvas[:, :height, :width] = image
    return canvas, F.pad(mask, (0, side - width, 0, side - height), value=IGNORED)

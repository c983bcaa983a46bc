"""From a photo and its mask to a training crop: scale, crop, flip, colours (the ADE20K recipe of MAE's and BEiT's UperNet).

Geometry treats both alike. All draws come from torch's global generator, so whoever seeds it fixes the crop.

Shapes: K channels, H x W as the photo is, S the crop's side.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import horizontal_flip, resize

from fastmae.evaluate.segmentation.layout import IGNORED

SCALES = (0.5, 2.0)
"""Between which the photo's scale is drawn."""
LARGEST_SHARE = 0.75
"""cat_max_ratio: a crop of which one class takes this share or more is drawn again."""
TRIES = 10
"""Crops that are drawn at most for that."""
LONG_SIDE = 4
"""A photo's longer side is at most this many times what its shorter side is brought to: 2048 for 512."""


@dataclass(frozen=True)
class Augmentation:
    """A random crop of a photo and its mask.

    Attributes:
        crop: S, in pixels.
        short_side: to which a photo's shorter side is brought before the scale is drawn; 0: it stays as it is.
        fill: a grey level a channel, for what lies outside a photo that is smaller than the crop.
    """

    crop: int
    short_side: int
    fill: tuple[int, ...]

    def __call__(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [K, H, W] and uint8 [H, W] -> uint8 [K, S, S] and uint8 [S, S]."""
        height, width = fitted_size((mask.shape[0], mask.shape[1]), self.short_side)
        scale = float(torch.empty(()).uniform_(*SCALES))
        image, mask = resized(image, mask, (max(1, round(height * scale)), max(1, round(width * scale))))
        top, left = draw_crop(mask, self.crop)
        image, mask = (part[..., top : top + self.crop, left : left + self.crop] for part in (image, mask))
        if torch.rand(()) < 0.5:
            image, mask = horizontal_flip(image), horizontal_flip(mask)
        return padded(distort_colours(image), mask, self.crop, self.fill)


def fitted_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(height, width) at which the shorter side is `short_side`, or the longer `LONG_SIDE` times that; for 0 the size as it is."""
    if not short_side:
        return size
    height, width = size
    scale = min(short_side / min(height, width), LONG_SIDE * short_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resized(image: torch.Tensor, mask: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Both at another size: colours are averaged, ids are picked, on the same grid of pixel centres."""
    if tuple(mask.shape) == size:
        return image, mask
    image = resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)
    return image, resize(mask[None], list(size), InterpolationMode.NEAREST_EXACT)[0]


def draw_crop(mask: torch.Tensor, side: int) -> tuple[int, int]:
    """Top and left of a crop; of at most `TRIES`, the first with no class over `LARGEST_SHARE` of its counted pixels, or the last."""
    height, width = mask.shape
    top = left = 0
    for _ in range(TRIES):
        top, left = (int(torch.randint(max(length - side, 0) + 1, ())) for length in (height, width))
        if largest_share(mask[top : top + side, left : left + side]) < LARGEST_SHARE:
            break
    return top, left


def largest_share(mask: torch.Tensor) -> float:
    """The most frequent class's part of the pixels that count; 1 where none does."""
    counts = torch.bincount(mask.flatten(), minlength=IGNORED + 1)[:IGNORED]
    return float(counts.max() / counts.sum()) if counts.any() else 1.0


def distort_colours(image: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast, saturation and hue, each in half of the photos, contrast first or last; grey takes the first two.

    Args:
        image: uint8 [K, H, W]; of another number of channels than one and three it stays as it is.
    """
    if image.shape[0] not in (1, 3):
        return image
    brightness, contrast = (
        _half_the_time(v2.ColorJitter(**{name: by})) for name, by in (("brightness", 32 / 255), ("contrast", 0.5))
    )
    colours = (
        [_half_the_time(v2.ColorJitter(saturation=0.5)), _half_the_time(v2.ColorJitter(hue=0.1))]
        if image.shape[0] == 3
        else []
    )
    steps = [brightness, contrast, *colours] if torch.rand(()) < 0.5 else [brightness, *colours, contrast]
    for step in steps:
        image = step(image)
    return image


def _half_the_time(transform: v2.Transform) -> v2.Transform:
    return v2.RandomApply([transform], p=0.5)


def padded(
    image: torch.Tensor, mask: torch.Tensor, side: int, fill: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both enlarged to `side`, to the right and below: with the fill, and with what is ignored."""
    height, width = mask.shape
    if height == width == side:
        return image, mask
    canvas = torch.tensor(fill, dtype=torch.uint8)[:, None, None].repeat(1, side, side)
    canvas[:, :height, :width] = image
    return canvas, F.pad(mask, (0, side - width, 0, side - height), value=IGNORED)

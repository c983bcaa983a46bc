"""Labelled images as a training or evaluation set, and how they are augmented or cropped."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch.utils.data import Dataset
from torchvision.transforms import v2

from fastmae.config.resolve import shown
from fastmae.errors import InputError
from fastmae.images.decode import decode_bands
from fastmae.images.reading import read_or_refuse
from fastmae.images.value_range import AUTO
from fastmae.runs.encoder import OpenedEncoder
from fastmae.runtime.seeding import drawn_from
from fastmae.runtime.wording import counted

CROP_RATIO = 224 / 256
"""Side of the centre crop, as a fraction of the resized picture's shorter side, as in MAE's evaluation."""
NOTATION = r"[a-z0-9]+(?:-[a-z]+(?:\d{1,3}(?:\.\d{1,6})?)?)*"
"""Of timm's RandAugment. It would repeat its operations any number of times: n1000000."""
BICUBIC = v2.InterpolationMode.BICUBIC
Transform = Callable[[Any], torch.Tensor]
"""A PIL image, or a list of one per channel -> float32 [K, S, S], normalised."""


class LabelledImages(Dataset[tuple[torch.Tensor, int]]):
    """Image files as (float32 [K, S, S], normalised; label).

    An index reads an image for evaluation. A visit (epoch, index) reads it for training: its augmentation follows from
    (seed, epoch, index).

    Args:
        paths: the image files.
        labels: int64 [len(paths)].
        channels: K; if neither 1 nor 3, the transform gets a list of K images.
        transform: augmentation or crop.
        seed: seed of the augmentation.
        value_range: how values of more than 8 bits become 8 bits.
    """

    def __init__(
        self,
        paths: list[Path],
        labels: torch.Tensor,
        channels: int,
        transform: Transform,
        seed: int = 0,
        value_range: str = AUTO,
    ):
        self.paths, self.labels, self.channels, self.transform, self.seed = paths, labels, channels, transform, seed
        self.value_range = value_range

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, visit: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = visit if isinstance(visit, tuple) else (0, visit)
        bands = self._decode(self.paths[index])
        with drawn_from(self.seed, epoch, index):
            return self.transform(bands[0] if len(bands) == 1 else bands), int(self.labels[index])

    def _decode(self, path: Path) -> list[Image.Image]:
        return read_or_refuse(
            path,
            lambda file: decode_bands(file, path.name, self.channels, value_range=self.value_range)[0],
            "remove it from the data",
        )


def full_augmentation(opened: OpenedEncoder, rand_augment: str, erasing: float) -> Transform:
    """MAE's augmentation for fine-tuning, by timm: random crop and flip, RandAugment, random erasing.

    Raises:
        InputError: images that are not RGB, or a RandAugment that timm does not know.
    """
    if opened.channels != 3:
        raise InputError(
            f"--augment full: RandAugment needs RGB images, not {counted(opened.channels, 'channel')}; use "
            "--augment crop"
        )
    try:
        if rand_augment and not re.fullmatch(NOTATION, rand_augment):
            raise ValueError
        transform: Any = create_transform(
            opened.image_size,
            is_training=True,
            color_jitter=0.0,
            auto_augment=rand_augment or None,
            interpolation="bicubic",
            re_prob=erasing,
            re_mode="pixel",
            re_count=1,
            mean=opened.mean,
            std=opened.std,
        )
    except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"--rand-augment {shown(rand_augment)}: not in timm's notation, as rand-m9-mstd0.5-inc1"
        ) from error
    for part in transform.transforms:
        for operation in getattr(part, "ops", []):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return cast(Transform, transform)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Posterize to at least one bit: timm's strongest level asks for 0 bits, which recent Pillow refuses."""
    return ImageOps.posterize(image, max(1, bits)) if bits < 8 else image


def crop_augmentation(opened: OpenedEncoder) -> Transform:
    """Random crop of 8 to 100 % of the area, and random flip."""
    size = opened.image_size
    return _to_normalised(
        opened, v2.RandomResizedCrop(size, interpolation=BICUBIC, antialias=True), v2.RandomHorizontalFlip()
    )


def centre_crop(opened: OpenedEncoder) -> Transform:
    """Resize the shorter side to 256/224 of the image size and crop the centre, as MAE evaluates."""
    return _to_normalised(opened, _CentreCrop(opened.image_size))


def _to_normalised(opened: OpenedEncoder, *geometry: Any) -> Transform:
    """The geometry works on the PIL images: tensors of whole pictures would be copies of them."""
    normalise = v2.Normalize(list(opened.mean), list(opened.std))
    return v2.Compose([*geometry, _ToTensor(), v2.ToDtype(torch.float32, scale=True), normalise])


@dataclass(frozen=True)
class _CentreCrop:
    """PIL images -> their centre, S x S, of the picture whose shorter side has S / `CROP_RATIO` pixels.

    That picture is never made: of one row of 20000 pixels, it would take gigabytes. Only its centre is resized.

    Attributes:
        size: S, in pixels.
    """

    size: int

    def __call__(self, image: Any) -> Any:
        return [self._cut(band) for band in image] if isinstance(image, list) else self._cut(image)

    def _cut(self, image: Image.Image) -> Image.Image:
        short_side = round(self.size / CROP_RATIO)
        resized = [short_side * side // min(image.size) for side in image.size]
        # Where the crop begins in the resized picture, and in the image itself.
        left, top = (round((side - self.size) / 2) for side in resized)
        x_scale, y_scale = (own / side for own, side in zip(image.size, resized, strict=True))
        box = (left * x_scale, top * y_scale, (left + self.size) * x_scale, (top + self.size) * y_scale)
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)


class _ToTensor:
    """A PIL image, or a list of one per channel -> uint8 [K, H, W]."""

    def __call__(self, image: Any) -> torch.Tensor:
        bands = image if isinstance(image, list) else [image]
        return torch.cat([v2.functional.pil_to_tensor(band) for band in bands])

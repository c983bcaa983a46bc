"""Labelled images as a training or evaluation set, and how they are augmented or cropped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch.utils.data import Dataset
from torchvision.transforms import v2

from fastmae.errors import InputError
from fastmae.images.decode import UndecodableError, decode_bands
from fastmae.images.value_range import AUTO
from fastmae.runs.encoder import OpenedEncoder
from fastmae.runtime.seeding import drawn_from

CROP_RATIO = 224 / 256
"""Side of the centre crop, as a fraction of the resized picture's shorter side, as in MAE's evaluation."""
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
        try:
            with path.open("rb") as file:
                return decode_bands(file, path.name, self.channels, value_range=self.value_range)[0]
        except UndecodableError as error:
            raise InputError(f"{path}: {error}; remove it from the data") from error


def full_augmentation(opened: OpenedEncoder, rand_augment: str, erasing: float) -> Transform:
    """MAE's augmentation for fine-tuning, by timm: random crop and flip, RandAugment, random erasing.

    Raises:
        InputError: images that are not RGB, or a RandAugment that timm does not know.
    """
    if opened.channels != 3:
        raise InputError(
            f"--augment full: RandAugment needs RGB images, not {opened.channels} channels; use --augment crop"
        )
    try:
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
    except (AssertionError, ValueError, KeyError) as error:
        raise InputError(f"--rand-augment {rand_augment}: not in timm's notation, as rand-m9-mstd0.5-inc1") from error
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
    size = opened.image_size
    return _to_normalised(opened, v2.Resize(round(size / CROP_RATIO), BICUBIC, antialias=True), v2.CenterCrop(size))


def _to_normalised(opened: OpenedEncoder, *geometry: Any) -> Transform:
    normalise = v2.Normalize(list(opened.mean), list(opened.std))
    return v2.Compose([_ToTensor(), *geometry, v2.ToDtype(torch.float32, scale=True), normalise])


class _ToTensor:
    """A PIL image, or a list of one per channel -> uint8 [K, H, W]."""

    def __call__(self, image: Any) -> torch.Tensor:
        bands = image if isinstance(image, list) else [image]
        return torch.cat([v2.functional.pil_to_tensor(band) for band in bands])

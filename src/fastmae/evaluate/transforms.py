"""Labelled pictures, train/<class>/* and val/<class>/*, for training on them: what is wrong with them is said before the start."""

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
from fastmae.runs.encoder import OpenedEncoder
from fastmae.runtime.seeding import drawn_from

CROP_SHARE = 224 / 256
"""The middle crop's side of the resized picture's shorter side, as MAE's evaluation has it."""


class LabelledPictures(Dataset[tuple[torch.Tensor, int]]):
    """Files -> (float32 [K, S, S], normalised; label). Takes a place (evaluation), or a visit (epoch, place), which draws its augmentation.

    Args:
        paths: of the pictures.
        labels: int64 [len(paths)].
        channels: K.
        transform: PIL image (K of them where K is neither 1 nor 3) -> tensor.
        seed: of the draws.
    """

    def __init__(
        self,
        paths: list[Path],
        labels: torch.Tensor,
        channels: int,
        transform: Callable[[Any], torch.Tensor],
        seed: int = 0,
    ):
        self.paths, self.labels, self.channels, self.transform, self.seed = paths, labels, channels, transform, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, visit: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, place = visit if isinstance(visit, tuple) else (0, visit)
        bands = self._decode(self.paths[place])
        with drawn_from(self.seed, epoch, place):
            return self.transform(bands[0] if len(bands) == 1 else bands), int(self.labels[place])

    def _decode(self, path: Path) -> list[Image.Image]:
        try:
            with path.open("rb") as file:
                return decode_bands(file, path.name, self.channels)[0]
        except UndecodableError as error:
            raise InputError(f"{path}: {error}; remove it from the data") from error


def full_augmentation(opened: OpenedEncoder, rand_augment: str, erasing: float) -> Callable[[Any], torch.Tensor]:
    """MAE's for fine-tuning, by timm: random crop and flip, RandAugment, erasing.

    Raises:
        InputError: images that are not RGB, or a RandAugment that timm does not know.
    """
    if opened.channels != 3:
        raise InputError(
            f"--augment full: RandAugment takes RGB images, not {opened.channels} channels; take --augment crop"
        )
    try:
        transform: Any = create_transform(
            opened.image_size, is_training=True, color_jitter=0.0, auto_augment=rand_augment or None, interpolation="bicubic",
            re_prob=erasing, re_mode="pixel", re_count=1, mean=opened.mean, std=opened.std,
        )  # fmt: skip
    except (AssertionError, ValueError, KeyError) as error:
        raise InputError(
            f"--rand-augment {rand_augment}: not timm's word for one, such as rand-m9-mstd0.5-inc1"
        ) from error
    for part in transform.transforms:
        for operation in getattr(part, "ops", []):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return cast(Callable[[Any], torch.Tensor], transform)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's strongest asks for 0 bits, which newer releases of Pillow refuse."""
    return ImageOps.posterize(image, max(1, bits)) if bits < 8 else image


def crop_augmentation(opened: OpenedEncoder) -> Callable[[Any], torch.Tensor]:
    """Random crop of 8 to 100 % of the area, and flip."""
    size = opened.image_size
    return _tensor_transform(
        opened, v2.RandomResizedCrop(size, interpolation=BICUBIC, antialias=True), v2.RandomHorizontalFlip()
    )


def middle_crop(opened: OpenedEncoder) -> Callable[[Any], torch.Tensor]:
    """The shorter side resized to 256/224 of the size, and the middle cut out of it, as MAE evaluates."""
    size = opened.image_size
    return _tensor_transform(opened, v2.Resize(round(size / CROP_SHARE), BICUBIC, antialias=True), v2.CenterCrop(size))


BICUBIC = v2.InterpolationMode.BICUBIC


def _tensor_transform(opened: OpenedEncoder, *geometry: Any) -> Callable[[Any], torch.Tensor]:
    return v2.Compose(
        [
            _ToTensor(),
            *geometry,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(opened.mean), list(opened.std)),
        ]
    )


class _ToTensor:
    """One PIL image, or one a channel -> uint8 [K, H, W]."""

    def __call__(self, image: Any) -> torch.Tensor:
        if not isinstance(image, list):
            return v2.functional.pil_to_tensor(image)
        return torch.cat([v2.functional.pil_to_tensor(band) for band in image])

"""Photos and their objects as Mask R-CNN takes them: decoded, made smaller where they are larger than needed, flipped.

Sizes only ever shrink here, so that a batch of large photos with all their masks fits into memory; what is smaller than the network's
image size is enlarged on the device, by torchvision's transform.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from fastmae.errors import InputError
from fastmae.evaluate.detection import masks
from fastmae.evaluate.detection.coco import Split
from fastmae.evaluate.detection.masks import Size
from fastmae.images.decode import UndecodableError, decode_bands

Objects = dict[str, torch.Tensor]
"""boxes float32 [N, 4] (left, top, right, bottom in pixels of the photo as it is given), labels int64 [N] from 1, masks uint8 [N, H, W]."""
Sample = tuple[torch.Tensor, Objects]
"""A photo, uint8 [K, H, W], and its objects."""


@dataclass(frozen=True)
class Limits:
    """How large photos are given to the network: the short side at `short` pixels, unless the long one would exceed `long`."""

    short: int
    long: int

    def cut(self, size: Size) -> Size:
        """(width, height) of a photo made smaller to within both limits, or its own."""
        scale = min(self.short / min(size), self.long / max(size))
        if scale >= 1:
            return size
        width, height = (max(1, round(side * scale)) for side in size)
        return width, height


class TrainingPhotos(Dataset[Sample]):
    """Photos to train on, half of them mirrored. A sample follows from (seed, epoch, index) alone.

    Args:
        split: the training split.
        limits: of the photos' size.
        channels: to which they are decoded, 1 or 3.
        seed: of what is drawn.
    """

    def __init__(self, split: Split, limits: Limits, channels: int, seed: int):
        self.split, self.limits, self.channels, self.seed = split, limits, channels, seed
        self.usable = split.trainable()

    def __len__(self) -> int:
        return len(self.usable)

    def __getitem__(self, visit: tuple[int, int]) -> Sample:
        epoch, index = visit
        image = self.usable[index]
        photo, objects = (
            load_photo(self.split, image, self.limits, self.channels),
            load_objects(self.split, image, self.limits),
        )
        return (
            mirrored(photo, objects)
            if np.random.default_rng((self.seed, epoch, index)).random() < 0.5
            else (photo, objects)
        )


class ValidationPhotos(Dataset[tuple[int, torch.Tensor]]):
    """Photos to evaluate on, with their places in the split.

    Args:
        split: the validation split.
        limits: as `TrainingPhotos`.
        channels: the same.
    """

    def __init__(self, split: Split, limits: Limits, channels: int):
        self.split, self.limits, self.channels = split, limits, channels

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, image: int) -> tuple[int, torch.Tensor]:
        return image, load_photo(self.split, image, self.limits, self.channels)


class Targets:
    """What a batch's photos show, on its way to the network.

    Fabric rounds every float tensor that it finds among a model's inputs to the run's precision. Boxes are no activations: in here
    they stay float32.

    Args:
        objects: of each photo.
    """

    def __init__(self, objects: Sequence[Objects]):
        self.objects = list(objects)

    def to(self, device: torch.device) -> "Targets":
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def pin_memory(self) -> "Targets":
        """The same in memory that a GPU copies from while it computes."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Targets":
        return Targets([{name: change(tensor) for name, tensor in objects.items()} for objects in self.objects])


def as_batch(samples: Sequence[Sample]) -> tuple[list[torch.Tensor], Targets]:
    """Samples -> photos, which differ in size, and what is in them."""
    photos, objects = zip(*samples, strict=True)
    return list(photos), Targets(objects)


def as_lists(samples: list[Any]) -> tuple[list[Any], list[Any]]:
    """Samples of two parts -> two lists: photos differ in size."""
    first, second = zip(*samples, strict=True)
    return list(first), list(second)


def load_photo(split: Split, image: int, limits: Limits, channels: int) -> torch.Tensor:
    """A photo within the limits, uint8 [K, H, W].

    Raises:
        InputError: it can't be decoded.
    """
    size, path = limits.cut(split.size(image)), split.path(image)
    reduced = min(size) if size != split.size(image) else None  # a JPEG is then decoded no larger than needed
    try:
        with path.open("rb") as file:
            bands, _ = decode_bands(file, path.name, channels, reduced)
    except UndecodableError as error:
        raise InputError(f"{path}: {error}; replace it, or remove it from {split.files.annotations}") from error
    resized = [
        np.asarray(band if band.size == size else band.resize(size, Image.Resampling.BILINEAR)) for band in bands
    ]
    return torch.from_numpy(
        np.stack(resized) if len(resized) > 1 or channels == 1 else resized[0].transpose(2, 0, 1).copy()
    )


def load_objects(split: Split, image: int, limits: Limits) -> Objects:
    """A photo's objects, without crowds, at the size of `load_photo`."""
    own = split.size(image)
    size = limits.cut(own)
    places = [place for place in split.objects(image) if not split.crowd[place]]
    scale = torch.tensor([size[0] / own[0], size[1] / own[1]] * 2)
    pixels = [masks.decode(split.counts(place), own, size) for place in places]
    return {
        "boxes": torch.from_numpy(split.boxes[places].reshape(-1, 4)) * scale,
        "labels": torch.from_numpy(split.labels[places]),
        "masks": torch.from_numpy(np.stack(pixels) if pixels else np.zeros((0, size[1], size[0]), dtype=np.uint8)),
    }


def mirrored(photo: torch.Tensor, objects: Objects) -> Sample:
    """Left and right exchanged, in the photo, the boxes and the masks."""
    left, top, right, bottom = objects["boxes"].unbind(1)
    width = photo.shape[-1]
    boxes = torch.stack([width - right, top, width - left, bottom], dim=1)
    return photo.flip(-1), {"boxes": boxes, "labels": objects["labels"], "masks": objects["masks"].flip(-1)}

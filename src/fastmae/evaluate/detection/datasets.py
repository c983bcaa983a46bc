"""Datasets of photos and their objects, as Mask R-CNN takes them.

Large photos are shrunk here, so that a batch of them with all their masks fits into memory. Small ones are enlarged on
the device, by the network's transform.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from fastmae.errors import InputError
from fastmae.evaluate.detection import masks
from fastmae.evaluate.detection.annotations import SMALLEST_SIDE
from fastmae.evaluate.detection.coco import Split
from fastmae.evaluate.detection.masks import Size
from fastmae.images.decode import decode_bands
from fastmae.images.reading import read_or_refuse
from fastmae.images.value_range import AUTO

Objects = dict[str, torch.Tensor]
"""`boxes` float32 [N, 4] (left, top, right, bottom in pixels of the photo), `labels` int64 [N] from 1, `masks` uint8
[N, H, W]."""
Sample = tuple[torch.Tensor, Objects]
"""A photo, uint8 [K, H, W], and its objects."""

MOST_MASK_BYTES = 2 << 30
"""Of a photo's objects, one byte for each pixel; each loading process holds those of several photos."""


@dataclass(frozen=True)
class SizeLimits:
    """Size of the photos for the network.

    Attributes:
        short: length of the short side in pixels, unless the long side would exceed `long`.
        long: upper limit of the long side, in pixels.
    """

    short: int
    long: int

    def shrink(self, size: Size) -> Size:
        """The (width, height) of a photo at this size if that is smaller; else the photo's own."""
        scale = min(self.short / min(size), self.long / max(size))
        if scale >= 1:
            return size
        width, height = (max(1, round(side * scale)) for side in size)
        return width, height


class TrainingPhotos(Dataset[Sample]):
    """Photos and their objects, half of them mirrored, indexed by (epoch, index).

    A sample's draws follow from (seed, epoch, index) alone.

    Args:
        split: the training split.
        limits: of the photos' size.
        channels: number of channels that photos are decoded to, 1 or 3.
        seed: the run's seed.
        value_range: how values of more than 8 bits become 8 bits.
    """

    def __init__(self, split: Split, limits: SizeLimits, channels: int, seed: int, value_range: str = AUTO):
        self.split, self.limits, self.channels, self.seed = split, limits, channels, seed
        self.value_range = value_range
        self.images = split.trainable_images()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, visit: tuple[int, int]) -> Sample:
        epoch, index = visit
        image = self.images[index]
        photo = load_photo(self.split, image, self.limits, self.channels, self.value_range)
        objects = load_objects(self.split, image, self.limits)
        flip = np.random.default_rng((self.seed, epoch, index)).random() < 0.5
        return mirror(photo, objects) if flip else (photo, objects)


class ValidationPhotos(Dataset[tuple[int, torch.Tensor]]):
    """(image, photo): the image's index in the split, and the photo uint8 [K, H, W].

    Args:
        split: the validation split.
        limits: of the photos' size.
        channels: number of channels that photos are decoded to, 1 or 3.
        value_range: how values of more than 8 bits become 8 bits.
    """

    def __init__(self, split: Split, limits: SizeLimits, channels: int, value_range: str = AUTO):
        self.split, self.limits, self.channels, self.value_range = split, limits, channels, value_range

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, image: int) -> tuple[int, torch.Tensor]:
        return image, load_photo(self.split, image, self.limits, self.channels, self.value_range)


class Targets:
    """The objects of a batch's photos, on their way to the network.

    Fabric casts every float tensor among a model's inputs to the run's precision, which would round boxes. It does not
    look into this class.

    Args:
        objects: one entry for each photo.
    """

    def __init__(self, objects: Sequence[Objects]):
        self.objects = list(objects)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Targets":
        """The targets on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory until the stream has done what it was given so far."""
        for objects in self.objects:
            for tensor in objects.values():
                tensor.record_stream(stream)

    def pin_memory(self) -> "Targets":
        """The targets in pinned memory, which a GPU copies from while it computes."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Targets":
        return Targets([{name: function(tensor) for name, tensor in objects.items()} for objects in self.objects])


def collate_photos(samples: Sequence[Sample]) -> tuple[list[torch.Tensor], Targets]:
    """A list of photos, since they differ in size, and their objects."""
    photos, objects = zip(*samples, strict=True)
    return list(photos), Targets(objects)


def load_photo(split: Split, image: int, limits: SizeLimits, channels: int, value_range: str = AUTO) -> torch.Tensor:
    """A photo within the limits, uint8 [K, H, W].

    Raises:
        InputError: it can't be decoded.
    """
    own_size, path = split.size(image), split.path(image)
    size = limits.shrink(own_size)
    at_least = min(size) if size != own_size else None  # lets a JPEG be decoded no larger than needed
    bands, _ = read_or_refuse(
        path,
        lambda file: decode_bands(file, path.name, channels, at_least, value_range),
        f"replace it, or remove it from {split.files.annotations}",
    )
    (band,) = bands  # one RGB or one grey image
    pixels = np.asarray(band if band.size == size else band.resize(size, Image.Resampling.BILINEAR))
    return torch.from_numpy(np.atleast_3d(pixels).transpose(2, 0, 1).copy())


def load_objects(split: Split, image: int, limits: SizeLimits) -> Objects:
    """A photo's objects at the size of `load_photo`, without crowds, and without those that are too thin there."""
    own_size = split.size(image)
    width, height = limits.shrink(own_size)
    scale = np.array([width / own_size[0], height / own_size[1]] * 2, dtype=np.float32)
    single = np.array(split.objects_without_crowds(image), dtype=np.int64)
    boxes = split.boxes[single].reshape(-1, 4) * scale
    is_wide = _sides(boxes).min(axis=1, initial=np.inf) >= SMALLEST_SIDE
    indices = single[is_wide]
    object_masks = [masks.decode(split.mask(index), own_size, (width, height)) for index in indices]
    stacked = np.stack(object_masks) if object_masks else np.zeros((0, height, width), dtype=np.uint8)
    return {
        "boxes": torch.from_numpy(boxes[is_wide]),
        "labels": torch.from_numpy(split.labels[indices]),
        "masks": torch.from_numpy(stacked),
    }


def check_objects(split: Split, limits: SizeLimits) -> int:
    """Check that the masks of every training photo fit into memory.

    Returns:
        How many objects will be left out, because they are thinner than `SMALLEST_SIDE` at this size.

    Raises:
        InputError: names the photo.
    """
    thin = 0
    for image in split.trainable_images():
        own_size, objects = split.size(image), split.objects_without_crowds(image)
        width, height = limits.shrink(own_size)
        if len(objects) * width * height > MOST_MASK_BYTES:
            raise InputError(
                f"{split.files.annotations}: {split.file_names[image]!r} has {len(objects)} objects, whose masks take "
                f"{len(objects) * width * height / 1e9:.1f} GB at {width} x {height} pixels; "
                "cut the photo into parts, or give a smaller --image-size"
            )
        scale = np.array([width / own_size[0], height / own_size[1]], dtype=np.float32)
        thin += int((_sides(split.boxes[objects]) * scale < SMALLEST_SIDE).any(axis=1).sum())
    return thin


def _sides(boxes: np.ndarray) -> np.ndarray:
    """Width and height, float32 [N, 2], of boxes [N, 4]."""
    return boxes[:, 2:] - boxes[:, :2]


def mirror(photo: torch.Tensor, objects: Objects) -> Sample:
    """Photo, boxes and masks flipped left to right."""
    left, top, right, bottom = objects["boxes"].unbind(1)
    width = photo.shape[-1]
    boxes = torch.stack([width - right, top, width - left, bottom], dim=1)
    return photo.flip(-1), {"boxes": boxes, "labels": objects["labels"], "masks": objects["masks"].flip(-1)}

"""Pairs of files -> tensors, in loading processes: augmented crops to train on, whole photos to evaluate.

A file is checked again here: it may have changed since the survey, or its ids were not read there.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import resize

from fastmae.errors import InputError
from fastmae.evaluate.segmentation.augment import Augmentation, fitted_size
from fastmae.evaluate.segmentation.layout import Pair, SegmentationData, read_mask
from fastmae.evaluate.segmentation.data_check import check_ids, check_sizes
from fastmae.images.decode import UndecodableError, decode_bands
from fastmae.images.middle import to_tensor
from fastmae.runtime.seeding import drawn_from


@dataclass(frozen=True)
class PairReader:
    """Reads a pair of files.

    Attributes:
        data: that the pairs are of.
        classes: how many there are.
        channels: K, to which the photos are decoded.
    """

    data: SegmentationData
    classes: int
    channels: int

    def __call__(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        """The photo, uint8 [K, H, W], and its mask, uint8 [H, W].

        Raises:
            InputError: a damaged photo or mask, sizes that differ, or an id that is no class's.
        """
        try:
            with pair.image.open("rb") as file:
                bands, _ = decode_bands(file, pair.image.name, self.channels)
        except UndecodableError as error:
            raise InputError(f"{pair.image}: {error}; remove it and its mask from the data") from error
        image, mask = (
            torch.cat([to_tensor(band) for band in bands]),
            torch.from_numpy(read_mask(pair.mask, self.data.reading)),
        )
        if image.shape[1:] != mask.shape:
            check_sizes(pair, self.channels)
            raise InputError(
                f"{pair.mask}: its size is not its image's; a mask holds one id for each pixel of its image"
            )
        check_ids(pair, np.bincount(mask.flatten(), minlength=256), self.classes, self.data)
        return image, mask


class TrainingCrops(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """An augmented crop a visit (epoch, index): uint8 [K, S, S] and uint8 [S, S], drawn from the seed and the visit alone.

    Args:
        pairs: of the training split.
        read: opens one.
        augment: makes the crop.
        seed: of all draws.
    """

    def __init__(self, pairs: list[Pair], read: PairReader, augment: Augmentation, seed: int):
        self.pairs, self.read, self.augment, self.seed = pairs, read, augment, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, visit: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index = visit
        image, mask = self.read(self.pairs[index])
        with drawn_from(self.seed, epoch, index):
            return self.augment(image, mask)


class WholePhotos(Dataset[tuple[int, torch.Tensor, torch.Tensor]]):
    """(index, photo, mask): uint8 [K, h, w] at the size at which it is seen, and uint8 [H, W] at its own.

    Args:
        pairs: of the validation split.
        read: opens one.
        short_side: to which a photo's shorter side is brought; 0: it stays as it is.
    """

    def __init__(self, pairs: list[Pair], read: PairReader, short_side: int):
        self.pairs, self.read, self.short_side = pairs, read, short_side

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        image, mask = self.read(self.pairs[index])
        own = (mask.shape[0], mask.shape[1])
        size = fitted_size(own, self.short_side)
        return index, image if size == own else resize(image, list(size), antialias=True), mask


def stack(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops -> uint8 [B, K, S, S] and uint8 [B, S, S]."""
    images, masks = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(masks)

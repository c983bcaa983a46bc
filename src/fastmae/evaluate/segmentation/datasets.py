"""Datasets of photos and masks: augmented crops to train on, whole photos to validate on.

Files are checked again when they are loaded: they may have changed since `data_check`, or were not read there.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import resize

from fastmae.errors import InputError
from fastmae.evaluate.segmentation.augment import Augmentation, size_for_short_side
from fastmae.evaluate.segmentation.data_check import check_ids, check_sizes
from fastmae.evaluate.segmentation.layout import Pair, SegmentationData
from fastmae.evaluate.segmentation.masks import IGNORED, read_mask
from fastmae.images.decode import decode_bands
from fastmae.images.middle import to_tensor
from fastmae.images.reading import read_or_refuse
from fastmae.images.value_range import AUTO
from fastmae.runtime.seeding import drawn_from


@dataclass(frozen=True)
class PairReader:
    """Loads a photo and its mask.

    Attributes:
        data: the data that the pairs belong to.
        num_classes: number of classes.
        channels: K, the number of channels that photos are decoded to.
        value_range: how values of more than 8 bits become 8 bits.
    """

    data: SegmentationData
    num_classes: int
    channels: int
    value_range: str = AUTO

    def __call__(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        """The photo, uint8 [K, H, W], and its mask, uint8 [H, W].

        Raises:
            InputError: a damaged photo or mask, sizes that differ, or an id that no class has.
        """
        bands, _ = read_or_refuse(
            pair.image,
            lambda file: decode_bands(file, pair.image.name, self.channels, value_range=self.value_range),
            "remove it and its mask from the data",
        )
        image = to_tensor(bands[0]) if len(bands) == 1 else torch.cat([to_tensor(band) for band in bands])
        mask = torch.from_numpy(read_mask(pair.mask, self.data.encoding))
        if image.shape[1:] != mask.shape:
            check_sizes(pair, self.channels, self.value_range)  # the headers tell more in most cases
            raise InputError(f"{pair.mask}: differs in size from its image; a mask holds one id for each pixel")
        counts = np.bincount(mask.flatten(), minlength=IGNORED + 1)
        check_ids(pair, counts, self.num_classes, self.data)
        return image, mask


class TrainingCrops(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Augmented crops, uint8 [K, S, S] and uint8 [S, S], indexed by (epoch, index).

    A crop's draws follow from (seed, epoch, index) alone.

    Args:
        pairs: the training pairs.
        read_pair: loads a pair.
        augment: makes a crop of it.
        seed: the run's seed.
    """

    def __init__(self, pairs: list[Pair], read_pair: PairReader, augment: Augmentation, seed: int):
        self.pairs, self.read_pair, self.augment, self.seed = pairs, read_pair, augment, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, visit: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index = visit
        image, mask = self.read_pair(self.pairs[index])
        with drawn_from(self.seed, epoch, index):
            return self.augment(image, mask)


class WholePhotos(Dataset[tuple[int, torch.Tensor, torch.Tensor]]):
    """(index, photo, mask): the photo uint8 [K, h, w] at the network's size, the mask uint8 [H, W] at its own size.

    Args:
        pairs: the validation pairs.
        read_pair: loads a pair.
        short_side: length to which a photo's shorter side is resized, in pixels; 0 keeps its own size.
    """

    def __init__(self, pairs: list[Pair], read_pair: PairReader, short_side: int):
        self.pairs, self.read_pair, self.short_side = pairs, read_pair, short_side

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        image, mask = self.read_pair(self.pairs[index])
        height, width = mask.shape
        size = size_for_short_side((height, width), self.short_side)
        if size != (height, width):
            image = resize(image, list(size), antialias=True)
        return index, image, mask

"""The middle images of a store, decoded ahead of time by worker processes, in batches of few large tensors."""

from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from fastmae.errors import InputError
from fastmae.images.entries import key_of
from fastmae.images.image_list import ImageList
from fastmae.images.middle import MiddleImage, make_middle_image
from fastmae.images.reading import Skipped, read_or_skip
from fastmae.images.sources import Source
from fastmae.runtime.workers import as_is, batches
from fastmae.tokens.format import StoreInfo, list_name

ImageRange = tuple[int, range]
"""Images that are read together: a part of the store, and positions in that part's image list."""


@dataclass(frozen=True)
class LoaderOptions:
    """How images reach the teacher.

    Attributes:
        batch_size: images per forward pass of the teacher.
        workers: decoding processes; -1 chooses by the number of cores.
        strict: stop at the first image that can't be decoded.
    """

    batch_size: int
    workers: int
    strict: bool = False


class ImageOutcome(NamedTuple):
    """One image of a batch.

    Attributes:
        key: the image's key.
        width: of the upright picture, in pixels; 0 when skipped.
        height: of the upright picture, in pixels; 0 when skipped.
        status: 'ok', or why the image was skipped.
    """

    key: str
    width: int
    height: int
    status: str

    @property
    def is_decoded(self) -> bool:
        """Whether the image could be decoded."""
        return self.status == "ok"


@dataclass(frozen=True)
class DecodedBatch:
    """A batch of images, n of which could be decoded.

    Attributes:
        images: all images of the batch, skipped ones too.
        pixels: middle images of those that were decoded, uint8 [n, K, S, S].
        jpegs: their JPEG files, one after the other, uint8 [bytes]; None if the store keeps raw pixels.
        jpeg_sizes: bytes of each JPEG.
        pixel_sums: float64 [2, K], sum and sum of squares of each channel over pixel values in [0, 1]; None if they
            were not asked for.
    """

    images: list[ImageOutcome]
    pixels: torch.Tensor
    jpegs: torch.Tensor | None
    jpeg_sizes: list[int]
    pixel_sums: torch.Tensor | None = None

    @property
    def decoded_keys(self) -> list[str]:
        """Keys of the images that were decoded."""
        return [image.key for image in self.images if image.is_decoded]

    @property
    def stored_bytes(self) -> int:
        """Bytes that the store keeps of the batch's pixels."""
        return self.pixels.numel() if self.jpegs is None else self.jpegs.numel()

    def stored_pixels(self) -> list[torch.Tensor]:
        """Pixels of each decoded image as the store keeps them: uint8 [bytes] of a JPEG, or uint8 [K, S, S]."""
        return list(self.pixels if self.jpegs is None else self.jpegs.split(self.jpeg_sizes))

    def only_what_is_stored(self) -> "DecodedBatch":
        """The batch without the pixels that a store of JPEGs does not keep."""
        return self if self.jpegs is None else replace(self, pixels=self.pixels[:0].clone())


class MiddleImages(Dataset[DecodedBatch]):
    """The middle images of a store.

    Args:
        info: description of the store.
        lists: image lists of the parts that are read, by the part's number.
        sources: where the images of the same parts are.

    Attributes:
        with_sums: whether batches come with their `pixel_sums`.
    """

    def __init__(self, info: StoreInfo, lists: Mapping[int, ImageList], sources: Mapping[int, Source]):
        self.info, self.lists, self.sources, self.with_sums = info, lists, sources, False

    @classmethod
    def of_store(cls, folder: Path, info: StoreInfo, sources: Mapping[int, Source]) -> "MiddleImages":
        """The images of a store's parts, with the image lists that lie in the store's folder."""
        return cls(info, {part: ImageList(folder / list_name(part)) for part in sources}, sources)

    @property
    def origin(self) -> Path:
        """Where the images of the first part come from, for messages."""
        return self.sources[min(self.sources)].path

    def __getitem__(self, image_range: ImageRange) -> DecodedBatch:
        part, positions = image_range
        image_list = self.lists[part]
        if positions.step == 1:
            entries = image_list.slice(positions.start, positions.stop)
        else:
            entries = [image_list.slice(position, position + 1)[0] for position in positions]
        outcomes: list[ImageOutcome] = []
        decoded: list[MiddleImage] = []
        for entry in entries:
            image = self._middle_image(self.sources[part], entry)
            if isinstance(image, Skipped):
                outcomes.append(ImageOutcome(key_of(entry), 0, 0, image.reason))
            else:
                outcomes.append(ImageOutcome(key_of(entry), image.width, image.height, "ok"))
                decoded.append(image)
        return self._batch(outcomes, decoded)

    def _batch(self, outcomes: list[ImageOutcome], decoded: list[MiddleImage]) -> DecodedBatch:
        """Join the images: a process hands over each tensor at the price of a file, so a batch has few of them."""
        shape = (0, self.info.channels, self.info.middle_size, self.info.middle_size)
        pixels = torch.stack([image.pixels for image in decoded]) if decoded else torch.zeros(shape, dtype=torch.uint8)
        sums = pixel_sums(pixels) if self.with_sums else None
        if self.info.pixels == "raw":
            return DecodedBatch(outcomes, pixels, None, [], sums)
        jpegs = [image.jpeg for image in decoded if image.jpeg is not None]
        joined = torch.cat(jpegs) if jpegs else torch.zeros(0, dtype=torch.uint8)
        return DecodedBatch(outcomes, pixels, joined, [len(jpeg) for jpeg in jpegs], sums)

    def _middle_image(self, source: Source, entry: bytes) -> MiddleImage | Skipped:
        info, key = self.info, key_of(entry)
        jpeg_quality = info.jpeg_quality if info.pixels == "jpeg" else None
        return read_or_skip(
            source,
            entry,
            lambda file: make_middle_image(
                file, key, info.middle_size, info.resize, jpeg_quality, info.channels, info.value_range
            ),
        )

    def batches_of(self, shard: int, batch_size: int) -> Iterator[ImageRange]:
        """Ranges of `batch_size` images that make up a shard.

        A batch never crosses a shard, so a shard's bytes do not depend on the shard at which a call began.
        """
        part, positions = self.info.part_of(shard)
        for start in range(0, len(positions), batch_size):
            yield part, positions[start : start + batch_size]

    def evenly_spaced(self, num_images: int, batch_size: int) -> list[ImageRange]:
        """Ranges of about `num_images` images, evenly spaced over the list of the first part, in batches."""
        part = min(self.sources)
        list_length = self.info.parts[part].images
        positions = range(0, list_length, max(1, list_length // num_images))
        return [(part, positions[start : start + batch_size]) for start in range(0, len(positions), batch_size)]

    def load(self, ranges: Iterable[ImageRange], workers: int, with_sums: bool = False) -> Iterator[DecodedBatch]:
        """The images of each range in order, decoded ahead of time by worker processes (-1 as in `LoaderOptions`)."""
        images = copy(self)
        images.with_sums = with_sums
        return batches(images, torch.device("cpu"), workers, sampler=ranges, collate=as_is)

    def check_strict(self, batch: DecodedBatch, strict: bool) -> None:
        """With `--strict`, refuse images that can't be decoded.

        Raises:
            InputError: names the first of them.
        """
        for image in batch.images if strict else ():
            if not image.is_decoded:
                raise InputError(
                    f"{self.origin}: {image.key}: {image.status}; repair or remove it, or leave out --strict to skip it"
                )


def pixel_sums(pixels: torch.Tensor) -> torch.Tensor:
    """Sum and sum of squares of each channel over pixel values in [0, 1]: uint8 [n, K, S, S] -> float64 [2, K].

    They are part of a shard's bytes, so the order of the additions stays. An exact sum of whole numbers would differ in
    the last bits.
    """
    if not len(pixels):
        return torch.zeros(2, pixels.shape[1], dtype=torch.float64)
    values = pixels.transpose(0, 1).flatten(1).double() / 255
    return torch.stack([values.sum(1), values.square().sum(1)])

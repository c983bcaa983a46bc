"""Filling a token store (Sec. 3.2.4, Fig. 3a): images -> middle images -> teacher -> shards.

Worker processes decode the images, this process runs the teacher, and a thread encodes the tokens and writes them. The
three overlap, and memory does not grow with the number of images. All shards are made here, by `build_shards`.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from fastmae.errors import InputError
from fastmae.images.entries import key_of
from fastmae.images.image_list import ImageList
from fastmae.images.middle import MiddleImage, make_middle_image
from fastmae.images.reading import Skipped, read_or_skip
from fastmae.images.sources import Source
from fastmae.runtime.device import pins_memory
from fastmae.runtime.progress import Progress
from fastmae.runtime.workers import as_is, batches, worker_count
from fastmae.teachers import Teacher
from fastmae.tokens.codec import Codec, learns, load_codec
from fastmae.tokens.format import CODEBOOKS_FILE, ImageRecord, StoreInfo, list_name
from fastmae.tokens.manifest import load_tensors
from fastmae.tokens.writer import StoreWriter

SAMPLE_TOKENS = 1 << 16
"""Most tokens that a codec learns from: 256 for each of a codebook's 256 entries. k-means gains nothing from more."""

ImageRange = tuple[int, range]
"""Images that are read together: a part of the store, and positions in that part's image list."""

KeyedImage = tuple[str, MiddleImage | Skipped]
"""An image's key, and its middle image or the reason why there is none."""


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


class MiddleImages(Dataset[list[KeyedImage]]):
    """The middle images of a store, decoded in worker processes.

    Args:
        info: description of the store.
        lists: image lists of the parts that are read, by the part's number.
        sources: where the images of the same parts are.
    """

    def __init__(self, info: StoreInfo, lists: Mapping[int, ImageList], sources: Mapping[int, Source]):
        self.info, self.lists, self.sources = info, lists, sources

    @classmethod
    def of_store(cls, folder: Path, info: StoreInfo, sources: Mapping[int, Source]) -> "MiddleImages":
        """The images of a store's parts, with the image lists that lie in the store's folder."""
        return cls(info, {part: ImageList(folder / list_name(part)) for part in sources}, sources)

    @property
    def origin(self) -> Path:
        """Where the images of the first part come from, for messages."""
        return self.sources[min(self.sources)].path

    def __getitem__(self, image_range: ImageRange) -> list[KeyedImage]:
        part, positions = image_range
        image_list = self.lists[part]
        if positions.step == 1:
            entries = image_list.slice(positions.start, positions.stop)
        else:
            entries = [image_list.slice(position, position + 1)[0] for position in positions]
        return [(key_of(entry), self._middle_image(self.sources[part], entry)) for entry in entries]

    def _middle_image(self, source: Source, entry: bytes) -> MiddleImage | Skipped:
        info, key = self.info, key_of(entry)
        jpeg_quality = info.jpeg_quality if info.pixels == "jpeg" else None
        return read_or_skip(
            source,
            entry,
            lambda file: make_middle_image(file, key, info.middle_size, info.resize, jpeg_quality, info.channels),
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

    def load(self, ranges: Iterable[ImageRange], workers: int) -> Iterator[list[KeyedImage]]:
        """The images of each range in order, decoded ahead of time by worker processes (-1 as in `LoaderOptions`)."""
        return batches(self, torch.device("cpu"), workers, sampler=ranges, collate=as_is)


@dataclass
class TeacherOutput:
    """What a shard keeps of a batch of images, n of which were decoded.

    Attributes:
        tokens: the teacher's features, float32 [n, grid, grid, C].
        flipped_tokens: features of the mirrored images, like `tokens`; None where the store does not keep them.
        pixels: pixels of each decoded image as the store keeps them (`stored_pixels`).
        pixel_sums: float64 [2, K], sum and sum of squares of each channel over pixel values in [0, 1].
        images: all images of the batch, skipped ones too.
    """

    tokens: torch.Tensor
    flipped_tokens: torch.Tensor | None
    pixels: list[torch.Tensor]
    pixel_sums: torch.Tensor
    images: list[KeyedImage]

    def to_host(self) -> "TeacherOutput":
        """Wait for the teacher and copy the tokens to the CPU."""
        self.tokens = self.tokens.cpu()
        self.flipped_tokens = None if self.flipped_tokens is None else self.flipped_tokens.cpu()
        return self


def build_shards(
    writer: StoreWriter,
    codec: Codec,
    shards: Iterable[int],
    images: MiddleImages,
    teacher: Teacher,
    options: LoaderOptions,
    progress: Progress,
) -> None:
    """Make shards. A file that lies in a shard's place is replaced once the new shard is complete.

    Args:
        writer: the store.
        codec: the store's codec, with its codebooks.
        shards: numbers of the shards to make.
        images: images of the parts to which these shards belong.
        teacher: the store's teacher.
        options: how images reach the teacher. Another batch size may round a token differently.
        progress: counts images.

    Raises:
        InputError: an image that can't be decoded, with `options.strict`.
    """
    shards = list(shards)

    def ranges() -> Iterator[tuple[int, ImageRange]]:
        return ((shard, batch) for shard in shards for batch in images.batches_of(shard, options.batch_size))

    num_workers = min(worker_count(options.workers), sum(1 for _ in ranges()))
    decoded = images.load((image_range for _, image_range in ranges()), num_workers)
    started = (
        (shard, run_teacher(teacher, batch, images, options))
        for (shard, _), batch in zip(ranges(), decoded, strict=True)
    )
    # Outputs are collected until a shard is complete. Then the thread writes the shard while the teacher goes on with
    # the next one. Before it gets another shard, the last one must be on the disk: two shards at most are in memory.
    with ThreadPoolExecutor(1) as disk:
        writing: Future[None] | None = None
        outputs: list[TeacherOutput] = []
        for shard, output in _one_behind(started):
            outputs.append(output.to_host())
            progress.advance(len(output.images))
            if sum(len(collected.images) for collected in outputs) == count_images(writer.info, [shard]):
                if writing is not None:
                    writing.result()
                writing = disk.submit(_write_shard, writer, codec, shard, outputs)
                outputs = []
        if writing is not None:
            writing.result()


def run_teacher(
    teacher: Teacher, batch: list[KeyedImage], images: MiddleImages, options: LoaderOptions
) -> TeacherOutput:
    """Start the teacher on a batch. On a GPU the tokens are still being computed when this returns.

    Raises:
        InputError: an image that can't be decoded, with `options.strict`.
    """
    for key, image in batch:
        if options.strict and isinstance(image, Skipped):
            raise InputError(
                f"{images.origin}: {key}: {image.reason}; repair or remove it, or leave out --strict to skip it"
            )
    decoded = [image for _, image in batch if isinstance(image, MiddleImage)]
    tokens = torch.zeros(0, teacher.grid, teacher.grid, teacher.token_dim)
    flipped_tokens = tokens if images.info.flips == "stored" else None
    pixel_sums = torch.zeros(2, images.info.channels, dtype=torch.float64)
    if decoded:
        device = teacher.mean.device
        pixels = torch.stack([image.pixels for image in decoded])
        values = pixels.transpose(0, 1).flatten(1).double() / 255
        pixel_sums = torch.stack([values.sum(1), values.square().sum(1)])
        if pins_memory(device):
            pixels = pixels.pin_memory()
        pixels = pixels.to(device, non_blocking=True)
        tokens = teacher(pixels)
        if flipped_tokens is not None:
            flipped_tokens = teacher(pixels.flip(-1))
    return TeacherOutput(tokens, flipped_tokens, [stored_pixels(image) for image in decoded], pixel_sums, batch)


def sample_tokens(
    images: MiddleImages, teacher: Teacher, options: LoaderOptions, num_images: int, seed: int, progress: Progress
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens for a codec to learn from, from images all over the list. The same list and seed give the same tokens.

    Returns:
        Tokens float32 [m, C], and float32 [m, C] with the mean token of each token's image.

    Raises:
        InputError: none of the images can be decoded.
    """
    ranges = images.evenly_spaced(num_images, options.batch_size)
    tokens_per_image = -(-SAMPLE_TOKENS // sum(len(positions) for _, positions in ranges))
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for batch in images.load(ranges, options.workers):
        for grid in run_teacher(teacher, batch, images, options).to_host().tokens:
            flat = grid.flatten(0, 1)
            drawn = flat[torch.randperm(len(flat), generator=generator)[:tokens_per_image]]
            samples.append(torch.stack([drawn, flat.mean(0).expand_as(drawn)]))
        progress.advance(len(batch))
    if not samples:
        raise InputError(f"{images.origin}: none of the {num_images} images tried could be decoded")
    tokens, means = torch.cat(samples, dim=1)
    return tokens, means


def stored_codec(folder: Path, info: StoreInfo) -> Codec:
    """The codec of a store, with the codebooks that lie in its folder.

    Raises:
        InputError: the codebooks are missing or damaged.
    """
    tensors = load_tensors(folder / CODEBOOKS_FILE) if learns(info.codec) else {}
    return load_codec(info.codec, info.token_dim, tensors)


def stored_pixels(image: MiddleImage) -> torch.Tensor:
    """The pixels of a middle image as a store keeps them: uint8 [bytes] of a JPEG, or uint8 [K, S, S]."""
    return image.pixels if image.jpeg is None else image.jpeg


def count_images(info: StoreInfo, shards: Iterable[int]) -> int:
    """Number of images in some of a store's shards, skipped ones included."""
    return sum(len(info.part_of(shard)[1]) for shard in shards)


def _write_shard(writer: StoreWriter, codec: Codec, shard: int, outputs: list[TeacherOutput]) -> None:
    """Join the outputs of a shard's batches, number the rows of the decoded images, and write the shard."""
    records: list[ImageRecord] = []
    row = 0
    for key, image in (keyed for output in outputs for keyed in output.images):
        if isinstance(image, Skipped):
            records.append(ImageRecord(key, -1, 0, 0, image.reason))
        else:
            records.append(ImageRecord(key, row, image.width, image.height, "ok"))
            row += 1
    flipped_tokens = [output.flipped_tokens for output in outputs if output.flipped_tokens is not None]
    writer.write_shard(
        shard,
        codec,
        torch.cat([output.tokens for output in outputs]),
        [pixels for output in outputs for pixels in output.pixels],
        torch.stack([output.pixel_sums for output in outputs]).sum(0),
        records,
        torch.cat(flipped_tokens) if flipped_tokens else None,
    )


def _one_behind(outputs: Iterator[tuple[int, TeacherOutput]]) -> Iterator[tuple[int, TeacherOutput]]:
    """Yield each output after the next one was started, so that a GPU never waits for the copy to the host."""
    previous: tuple[int, TeacherOutput] | None = None
    for output in outputs:
        if previous is not None:
            yield previous
        previous = output
    if previous is not None:
        yield previous

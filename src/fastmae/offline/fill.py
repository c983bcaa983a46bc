"""The offline stage (Sec. 3.2.4, Fig. 3a): images -> middle images (in worker processes) -> teacher (here) -> shards (a thread).

The three overlap, and nothing grows with the number of images.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from fastmae.errors import InputError
from fastmae.images.entries import key_of
from fastmae.images.image_list import ImageList
from fastmae.images.middle import MiddleImage, make_middle_image
from fastmae.images.reading import Skipped, read_or_skip
from fastmae.images.sources import Source
from fastmae.runtime.progress import Progress
from fastmae.runtime.workers import guarded, heed_only_the_parent, worker_count
from fastmae.teachers import Teacher
from fastmae.tokens.codec import Codec
from fastmae.tokens.format import ImageRecord, StoreInfo, list_name
from fastmae.tokens.writer import StoreWriter

SAMPLE_TOKENS = 1 << 16
"""From which a codec learns, at most: 256 for each of a table's 256 rows, beyond which k-means gains nothing."""


ImageRange = tuple[int, range]
"""Images to read together: a part of the store, and places in its list."""


@dataclass(frozen=True)
class LoaderOptions:
    """How images are loaded and fed.

    Attributes:
        batch_size: images a teacher forward.
        workers: decoding processes, as `--workers`.
        strict: stop at the first image that can't be decoded.
    """

    batch_size: int
    workers: int
    strict: bool = False


class MiddleImages(Dataset[list[tuple[str, "MiddleImage | Skipped"]]]):
    """The images of a store's lists: places -> (key, middle image or why there is none), read in worker processes.

    Args:
        info: of the store.
        lists: of each part that is read.
        sources: of the same.
    """

    def __init__(self, info: StoreInfo, lists: Mapping[int, ImageList], sources: Mapping[int, Source]):
        self.info, self.lists, self.sources = info, lists, sources

    @classmethod
    def of_store(cls, folder: Path, info: StoreInfo, sources: Mapping[int, Source]) -> "MiddleImages":
        """Those of a store that is being built, or repaired: of the parts whose sources are given."""
        return cls(info, {part: ImageList(folder / list_name(part)) for part in sources}, sources)

    def __getitem__(self, places: ImageRange) -> list[tuple[str, "MiddleImage | Skipped"]]:
        part, chosen = places
        if chosen.step == 1:
            entries = self.lists[part].slice(chosen.start, chosen.stop)
        else:
            entries = [entry for place in chosen for entry in self.lists[part].slice(place, place + 1)]
        return [(key_of(entry), self._middle_image(self.sources[part], entry)) for entry in entries]

    def _middle_image(self, source: Source, entry: bytes) -> "MiddleImage | Skipped":
        info = self.info
        quality = info.jpeg_quality if info.pixels == "jpeg" else None
        size, name = info.middle_size, key_of(entry)
        return read_or_skip(
            source, entry, lambda file: make_middle_image(file, name, size, info.resize, quality, info.channels)
        )

    def batches_of(self, shard: int, batch_size: int) -> Iterator[ImageRange]:
        """A shard's images, `batch_size` at a time. Batches never cross a shard, so its bytes don't depend on where a call began."""
        part, places = self.info.part_of(shard)
        for start in range(0, len(places), batch_size):
            yield part, places[start : start + batch_size]

    def evenly_spaced(self, count: int, batch_size: int) -> list[ImageRange]:
        """About `count` images from all over the list of the first part that is read, `batch_size` at a time."""
        part = min(self.sources)
        images = self.info.parts[part].images
        places = range(0, images, max(1, images // count))
        return [(part, places[start : start + batch_size]) for start in range(0, len(places), batch_size)]

    @property
    def origin(self) -> Path:
        """Where the first part that is read comes from, for messages."""
        return self.sources[min(self.sources)].path

    def load(self, batches: Iterable[ImageRange], workers: int) -> Iterator[list[tuple[str, "MiddleImage | Skipped"]]]:
        """Batches in their order, decoded ahead in worker processes."""
        loader = DataLoader(
            self, batch_size=None, sampler=batches, num_workers=workers, collate_fn=_as_it_is,
            prefetch_factor=2 if workers else None, worker_init_fn=heed_only_the_parent,
        )  # fmt: skip
        return guarded(loader)


@dataclass
class TeacherOutput:
    """A batch after the teacher: tokens float32 [n, grid, grid, C] (and the mirrored images') and stored pixels of the n decoded;
    sums and sums of squares float64 [2, K] of their pixels; records of all."""

    tokens: torch.Tensor
    flipped_tokens: torch.Tensor | None
    pixels: list[torch.Tensor]
    pixel_sums: torch.Tensor
    records: list[tuple[str, "MiddleImage | Skipped"]]

    def to_host(self) -> "TeacherOutput":
        """Wait for the teacher and bring its tokens over."""
        self.tokens = self.tokens.cpu()
        self.flipped_tokens = None if self.flipped_tokens is None else self.flipped_tokens.cpu()
        return self


def build_shards(
    writer: StoreWriter,
    codec: Codec,
    shards: Iterable[int],
    images: MiddleImages,
    teacher: Teacher,
    loading: LoaderOptions,
    progress: Progress,
) -> None:
    """Make shards."""
    shards = list(shards)

    def batches() -> Iterator[tuple[int, ImageRange]]:
        return ((shard, places) for shard in shards for places in images.batches_of(shard, loading.batch_size))

    loaded = images.load(
        (places for _, places in batches()), min(worker_count(loading.workers), sum(1 for _ in batches()))
    )
    started = (
        (shard, run_teacher(teacher, batch, images, loading))
        for (shard, _), batch in zip(batches(), loaded, strict=True)
    )
    with ThreadPoolExecutor(1) as disk:
        writing: Future[None] | None = None
        shard_parts: list[TeacherOutput] = []
        for shard, part in _one_behind(started):
            shard_parts.append(part.to_host())
            progress.advance(len(part.records))
            if sum(len(part.records) for part in shard_parts) == len(writer.info.part_of(shard)[1]):
                if writing is not None:
                    writing.result()
                writing = disk.submit(_write, writer, codec, shard, shard_parts)
                shard_parts = []
        if writing is not None:
            writing.result()


def run_teacher(
    teacher: Teacher, batch: list[tuple[str, "MiddleImage | Skipped"]], images: MiddleImages, loading: LoaderOptions
) -> TeacherOutput:
    """Start the teacher on a batch; on a GPU the tokens are still being computed when this returns.

    Raises:
        InputError: an image that can't be decoded, when that is not to be skipped.
    """
    for key, image in batch:
        if loading.strict and isinstance(image, Skipped):
            raise InputError(
                f"{images.origin}: {key}: {image.reason}; repair or remove it, or leave out --strict to skip it"
            )
    decoded = [image for _, image in batch if isinstance(image, MiddleImage)]
    empty = torch.zeros(0, teacher.grid, teacher.grid, teacher.token_dim)
    tokens, flipped = empty, empty if images.info.flips == "stored" else None
    sums = torch.zeros(2, images.info.channels, dtype=torch.float64)
    if decoded:
        device = teacher.mean.device
        pixels = torch.stack([image.pixels for image in decoded])
        values = pixels.transpose(0, 1).flatten(1).double() / 255
        sums = torch.stack([values.sum(1), values.square().sum(1)])
        if device.type == "cuda":
            pixels = pixels.pin_memory()
        pixels = pixels.to(device, non_blocking=True)
        tokens = teacher(pixels)
        if flipped is not None:
            flipped = teacher(pixels.flip(-1))
    kept = [image.pixels if image.jpeg is None else image.jpeg for image in decoded]
    return TeacherOutput(tokens, flipped, kept, sums, batch)


def sample_tokens(
    images: MiddleImages, teacher: Teacher, loading: LoaderOptions, count: int, seed: int, progress: Progress
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of images from all over the list for a codec to learn from, the same for the same list and seed.

    Returns:
        float32 [m, C] each: the tokens, and of each the mean token of its image.

    Raises:
        InputError: none of them could be decoded.
    """
    batches = images.evenly_spaced(count, loading.batch_size)
    per_image = -(-SAMPLE_TOKENS // sum(len(places) for _, places in batches))
    random = torch.Generator().manual_seed(seed)
    found = []
    for batch in images.load(batches, min(worker_count(loading.workers), len(batches))):
        for grid in run_teacher(teacher, batch, images, loading).to_host().tokens:
            flat = grid.flatten(0, 1)
            some = flat[torch.randperm(len(flat), generator=random)[:per_image]]
            found.append(torch.stack([some, flat.mean(0).expand_as(some)]))
        progress.advance(len(batch))
    if not found:
        raise InputError(f"{images.origin}: none of the {count} images tried could be decoded")
    tokens, means = torch.cat(found, dim=1)
    return tokens, means


def _write(writer: StoreWriter, codec: Codec, shard: int, parts: list[TeacherOutput]) -> None:
    records: list[ImageRecord] = []
    row = 0
    for key, image in (record for part in parts for record in part.records):
        if isinstance(image, Skipped):
            records.append(ImageRecord(key, -1, 0, 0, image.reason))
        else:
            records.append(ImageRecord(key, row, image.width, image.height, "ok"))
            row += 1
    flipped = [part.flipped_tokens for part in parts if part.flipped_tokens is not None]
    writer.write_shard(
        shard,
        codec,
        torch.cat([part.tokens for part in parts]),
        [pixels for part in parts for pixels in part.pixels],
        torch.stack([part.pixel_sums for part in parts]).sum(0),
        records,
        torch.cat(flipped) if flipped else None,
    )


def _one_behind(parts: Iterator[tuple[int, TeacherOutput]]) -> Iterator[tuple[int, TeacherOutput]]:
    """Each item once the next one was started: a GPU has its next batch before the last one's tokens are waited for."""
    before: tuple[int, TeacherOutput] | None = None
    for item in parts:
        if before is not None:
            yield before
        before = item
    if before is not None:
        yield before


def _as_it_is(batch: list[tuple[str, "MiddleImage | Skipped"]]) -> list[tuple[str, "MiddleImage | Skipped"]]:
    return batch

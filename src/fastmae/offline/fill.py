"""Filling a token store (Sec. 3.2.4, Fig. 3a): images -> middle images -> teacher -> shards.

Worker processes decode the images (`middle_images`), this process runs the teacher and the codec (`encoding`), and
threads write the shards. The three overlap, and memory does not grow with the number of images. All shards are made
here, by `build_shards`.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastmae.offline.encoding import Encoder, encoder_of
from fastmae.offline.middle_images import DecodedBatch, ImageRange, LoaderOptions, MiddleImages
from fastmae.runtime.progress import Progress
from fastmae.runtime.workers import worker_count
from fastmae.teachers import Teacher
from fastmae.tokens.codec import Codec, learnt_shapes, load_codec
from fastmae.tokens.format import CODEBOOKS_FILE, StoreInfo
from fastmae.tokens.shard_header import ImageRecord
from fastmae.tokens.tensor_file import load_tensors
from fastmae.tokens.writer import StoredPixels, StoreWriter

Output = tuple[int, DecodedBatch, Any]
"""A shard's number, one of its batches, and what the encoder made of it."""


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
    encoder = encoder_of(teacher, codec, writer.info.flips == "stored")
    fill_shards(writer, encoder, list(shards), images, options, progress)


def fill_shards(
    writer: StoreWriter,
    encoder: Encoder,
    shards: list[int],
    images: MiddleImages,
    options: LoaderOptions,
    progress: Progress,
) -> None:
    """Like `build_shards`, with any encoder."""

    def ranges() -> Iterator[tuple[int, ImageRange]]:
        return ((shard, batch) for shard in shards for batch in images.batches_of(shard, options.batch_size))

    num_workers = min(worker_count(options.workers), sum(1 for _ in ranges()))
    decoded = images.load((image_range for _, image_range in ranges()), num_workers, encoder.needs_pixel_sums)

    def started() -> Iterator[Output]:
        for (shard, _), batch in zip(ranges(), decoded, strict=True):
            images.check_strict(batch, options.strict)
            yield shard, batch.only_what_is_stored(), encoder.start(batch)

    # Outputs are collected until a shard is complete. Then a thread writes it while the encoder goes on with the next
    # one. As many shards as there are threads, and the one that is collected, are in memory at most.
    with ThreadPoolExecutor(encoder.writers) as disk:
        writing: deque[Future[None]] = deque()
        batches: list[DecodedBatch] = []
        outputs: list[Any] = []
        for shard, batch, output in _behind(started(), encoder.batches_ahead):
            batches.append(batch)
            outputs.append(encoder.finish(output))
            progress.advance(len(batch.images))
            if sum(len(collected.images) for collected in batches) == count_images(writer.info, [shard]):
                if len(writing) == encoder.writers:
                    writing.popleft().result()
                writing.append(disk.submit(_write_shard, writer, encoder, shard, batches, outputs))
                batches, outputs = [], []
        for shard_written in writing:
            shard_written.result()


def stored_codec(folder: Path, info: StoreInfo) -> Codec:
    """The codec of a store, with the codebooks that lie in its folder.

    Raises:
        InputError: the codebooks are missing or damaged.
    """
    shapes = learnt_shapes(info.codec, info.token_dim)
    tensors = load_tensors(folder / CODEBOOKS_FILE, shapes) if shapes else {}
    return load_codec(info.codec, info.token_dim, tensors)


def count_images(info: StoreInfo, shards: Iterable[int]) -> int:
    """Number of images in some of a store's shards, skipped ones included."""
    return sum(len(info.part_of(shard)[1]) for shard in shards)


def _write_shard(
    writer: StoreWriter, encoder: Encoder, shard: int, batches: list[DecodedBatch], outputs: list[Any]
) -> None:
    """Number the rows of the decoded images, and write the shard."""
    records: list[ImageRecord] = []
    row = 0
    for image in (image for batch in batches for image in batch.images):
        records.append(ImageRecord(image.key, row if image.is_decoded else -1, *image[1:]))
        row += image.is_decoded
    encoded = encoder.encoded(outputs)
    jpegs = [batch.jpegs for batch in batches if batch.jpegs is not None]
    pixels = (
        StoredPixels(jpegs, [batch.jpeg_sizes for batch in batches])
        if jpegs
        else StoredPixels([batch.pixels for batch in batches], None)
    )
    writer.write_shard(shard, encoded.tokens, pixels, encoded.pixel_sums, records, encoded.flipped_tokens)


def _behind(outputs: Iterator[Output], count: int) -> Iterator[Output]:
    """Yield each output after the next `count` were started, so that an accelerator always has work."""
    waiting: deque[Output] = deque()
    for output in outputs:
        waiting.append(output)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting

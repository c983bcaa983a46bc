"""What tokenising costs the CPU beside an accelerator: everything but the decoding, the teacher and the codec.

The codes are ready, as a device would send them. The rest is what `tokenize` does, by the same code: it takes the
decoded images from the loading processes, stages them for the upload, computes checksums and writes shards.
"""

import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastmae.bench.sample import evenly_spaced
from fastmae.bench.stores import begin_store
from fastmae.bench.timing import interleave
from fastmae.images.sources import Source
from fastmae.offline.encoding import BatchCodes, DeviceEncoder, EncodedShard, join_codes, writers_beside_a_device
from fastmae.offline.fill import fill_shards
from fastmae.offline.middle_images import DecodedBatch, ImageRange, LoaderOptions, MiddleImages
from fastmae.runtime.progress import Progress, counted_through
from fastmae.runtime.workers import worker_count
from fastmae.tokens.codec import Codec
from fastmae.tokens.encoded import EncodedImages
from fastmae.tokens.format import StoreInfo
from fastmae.tokens.writer import StoreWriter

MOST_IMAGES = 512
"""Images in a round. They lie in memory, decoded."""


class ReadyCodes:
    """An encoder that computes nothing: each batch gets codes that were made before.

    Args:
        codec: the codec of the codes.
        grids: tokens to make them of, float32 [n, grid, grid, C].
        batch_size: most images in a batch.
        pixel_shape: (K, S, S) of the middle images.

    Attributes:
        started_at: the process's CPU time when the first batch arrived, in seconds.
    """

    batches_ahead = DeviceEncoder.batches_ahead
    needs_pixel_sums = DeviceEncoder.needs_pixel_sums

    def __init__(self, codec: Codec, grids: torch.Tensor, batch_size: int, pixel_shape: tuple[int, int, int]):
        self.codec, self.writers = codec, writers_beside_a_device()
        self.ready = EncodedImages.of(codec, grids[torch.arange(max(batch_size, len(grids))) % len(grids)])
        self.staging = torch.empty(batch_size, *pixel_shape, dtype=torch.uint8)
        self.started_at: float | None = None

    def start(self, batch: DecodedBatch) -> DecodedBatch:
        """Copy the pixels, as an upload copies them into pinned memory."""
        if self.started_at is None:
            self.started_at = time.process_time()
        self.staging[: len(batch.pixels)].copy_(batch.pixels)
        return batch

    def finish(self, started: DecodedBatch) -> BatchCodes:
        """The first of the ready codes."""
        count = len(started.pixels)
        codes = EncodedImages(self.ready.codes[:count], self.ready.means[:count], self.ready.sums, self.ready.peak)
        codes.check(self.codec)
        return BatchCodes(codes, None, torch.zeros(2, started.pixels.shape[1], dtype=torch.int64))

    def encoded(self, outputs: Sequence[BatchCodes]) -> EncodedShard:
        """See `Encoder`."""
        return join_codes(outputs)


class DecodedImages(MiddleImages):
    """Middle images that were decoded before; the loading processes only hand them over.

    Args:
        images: the images.
        batch_size: images in a batch.
        workers: decoding processes.
    """

    def __init__(self, images: MiddleImages, batch_size: int, workers: int):
        super().__init__(images.info, images.lists, images.sources)
        ranges = [batch for shard in range(images.info.shards) for batch in images.batches_of(shard, batch_size)]
        loaded = counted_through(
            images.load(ranges, min(worker_count(workers), len(ranges))), "decode", "batches", len(ranges)
        )
        self.decoded = dict(zip(ranges, loaded, strict=True))

    def __getitem__(self, image_range: ImageRange) -> DecodedBatch:
        return self.decoded[image_range]


def host_costs(
    folder: Path,
    info: StoreInfo,
    codecs: Sequence[Codec],
    grids: torch.Tensor,
    source: Source,
    entries: list[bytes],
    loading: LoaderOptions,
    rounds: int,
) -> list[dict[str, float]]:
    """Measure the host's CPU time an image for each codec, side by side.

    Args:
        folder: where stores are built and removed again.
        info: description of the stores; the codec and the parts are replaced.
        codecs: the contenders.
        grids: tokens to make codes of, float32 [n, grid, grid, C].
        source: the images.
        entries: images to choose from.
        loading: how images are loaded and fed to the teacher.
        rounds: number of rounds that count.

    Returns:
        For each codec `host_ms_per_image`, the median over rounds of the CPU time of all this process's threads, with
        `_min` and `_max`. The start of the loading processes is not in it.
    """
    chosen = evenly_spaced(entries, min(MOST_IMAGES, len(entries)))
    parts = (begin_store(folder / "decoded", source, chosen),)
    described = replace(info, parts=parts)
    pixel_shape = (info.channels, info.middle_size, info.middle_size)
    images = DecodedImages(
        MiddleImages.of_store(folder / "decoded", described, {0: source}), loading.batch_size, loading.workers
    )

    def build(codec: Codec) -> float:
        store = folder / codec.name
        begin_store(store, source, chosen)
        writer = StoreWriter(store, replace(described, codec=codec.name))
        encoder = ReadyCodes(codec, grids, loading.batch_size, pixel_shape)
        progress = Progress("", "images", total=described.images, quiet=True)
        fill_shards(writer, encoder, list(range(described.shards)), images, loading, progress)
        assert encoder.started_at is not None
        seconds = time.process_time() - encoder.started_at
        shutil.rmtree(store)
        return seconds

    turns: dict[str, Any] = {codec.name: lambda _, codec=codec: build(codec) for codec in codecs}
    seconds = interleave(turns, rounds, "time the host")
    return [
        {
            "host_ms_per_image": round(1e3 * statistics.median(seconds[codec.name]) / described.images, 3),
            "host_ms_per_image_min": round(1e3 * min(seconds[codec.name]) / described.images, 3),
            "host_ms_per_image_max": round(1e3 * max(seconds[codec.name]) / described.images, 3),
        }
        for codec in codecs
    ]

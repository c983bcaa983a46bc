"""How fast a store is built, compared with the bare teacher: what decoding, encoding and writing cost."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastmae.bench.sample import evenly_spaced
from fastmae.bench.stores import begin_store
from fastmae.bench.timing import Rate, interleave, same_every_round, seconds_of
from fastmae.images.sources import Source
from fastmae.offline.fill import build_shards
from fastmae.offline.middle_images import LoaderOptions, MiddleImages
from fastmae.runtime.progress import Progress, counted_through
from fastmae.runtime.workers import worker_count
from fastmae.teachers import Teacher
from fastmae.tokens.codec import Codec
from fastmae.tokens.format import StoreInfo
from fastmae.tokens.writer import StoreWriter

ROUND_SECONDS = 10.0
"""How long the bare teacher works in a round, about. The start of the decoding processes hardly counts beside it."""
MAX_IMAGES = 2048
"""The bare teacher's images lie in memory."""


def building_rate(
    folder: Path,
    info: StoreInfo,
    codec: Codec,
    source: Source,
    entries: list[bytes],
    teacher: Teacher,
    loading: LoaderOptions,
    rounds: int,
) -> dict[str, Any]:
    """Time the building of a store and the bare teacher side by side, on the same images.

    The bare teacher gets its images decoded, on its device, in batches of the same size. It computes in its own
    precision, as for the store.

    Args:
        folder: where stores are built and removed again.
        info: description of the store; its parts are replaced.
        codec: encodes the store's tokens.
        source: the images.
        entries: images to choose from; as many are used as the teacher can do in `ROUND_SECONDS`.
        teacher: on its device.
        loading: how images are loaded and fed to the teacher.
        rounds: number of rounds that count.

    Returns:
        `teacher_images_per_second` and `tokenize_images_per_second`, each with `_min` and `_max`, and their `ratio`;
        the number of `images` in a round; the `codec`; and the number of decoding `workers`.
    """
    count = _images_per_round(teacher, info.middle_size, info.channels, loading.batch_size)
    chosen = evenly_spaced(entries, count)
    info = replace(info, parts=(begin_store(folder / "0", source, chosen),))
    batches = _decoded_batches(MiddleImages.of_store(folder / "0", info, {0: source}), teacher, loading)
    images = sum(len(pixels) for pixels in batches)

    def run_teacher_alone() -> None:
        for pixels in batches:
            teacher(pixels)

    def build(number: int) -> float:
        store = folder / str(number)
        begin_store(store, source, chosen)
        writer, middle_images = StoreWriter(store, info), MiddleImages.of_store(store, info, {0: source})
        shards = range(info.shards)
        progress = Progress("", "images", total=images, quiet=True)
        seconds = seconds_of(lambda: build_shards(writer, codec, shards, middle_images, teacher, loading, progress))
        shutil.rmtree(store)
        return seconds

    turns = {"teacher": same_every_round(run_teacher_alone, teacher.mean.device), "tokenize": build}
    seconds = interleave(turns, rounds, "time the building")
    bare, building = (Rate.of(images, seconds[name]) for name in ("teacher", "tokenize"))
    return {
        **bare.to_json("teacher_images_per_second"),
        **building.to_json("tokenize_images_per_second"),
        "ratio": round(building.median / bare.median, 3),
        "images": images,
        "codec": info.codec,
        "workers": worker_count(loading.workers),
    }


def _images_per_round(teacher: Teacher, size: int, channels: int, batch_size: int) -> int:
    """Images that the teacher does in about `ROUND_SECONDS`: whole batches, at least two."""
    batch = torch.zeros(batch_size, channels, size, size, dtype=torch.uint8, device=teacher.mean.device)
    with Progress("time the teacher", minor=True):
        seconds_of(lambda: teacher(batch), batch.device)  # warms up
        batches = round(ROUND_SECONDS / seconds_of(lambda: teacher(batch), batch.device))
    return batch_size * max(2, min(batches, MAX_IMAGES // batch_size))


def _decoded_batches(images: MiddleImages, teacher: Teacher, loading: LoaderOptions) -> list[torch.Tensor]:
    """The pixels of the images that can be decoded, one uint8 [n, K, S, S] per batch, on the teacher's device."""
    shards = range(images.info.shards)
    ranges = [image_range for shard in shards for image_range in images.batches_of(shard, loading.batch_size)]
    loaded = images.load(ranges, min(worker_count(loading.workers), len(ranges)))
    decoded = counted_through(loaded, "decode", "batches", len(ranges))
    return [batch.pixels.to(teacher.mean.device) for batch in decoded if len(batch.pixels)]

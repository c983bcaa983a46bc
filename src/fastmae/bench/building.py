"""How fast a store is built, beside the bare teacher on pixels that lie ready: what decoding, encoding and writing add to it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastmae.bench.codecs import finished
from fastmae.bench.sample import begin_store, evenly
from fastmae.bench.timing import Rate, interleave, seconds_of
from fastmae.images.middle import MiddleImage
from fastmae.images.sources import Source
from fastmae.offline.fill import Loading, StoreImages, fill
from fastmae.runtime.progress import Progress
from fastmae.runtime.workers import worker_count
from fastmae.teachers import Teacher
from fastmae.tokens.codec import Codec
from fastmae.tokens.format import StoreInfo
from fastmae.tokens.writer import StoreWriter

SECONDS = 10.0
"""Of the bare teacher in a round, about: beside it the start of the decoding processes is small."""
MOST = 2048
"""Images at most; they lie in memory."""


def building_rate(
    folder: Path,
    info: StoreInfo,
    codec: Codec,
    source: Source,
    entries: list[bytes],
    teacher: Teacher,
    loading: Loading,
    rounds: int,
) -> dict[str, Any]:
    """Time both on the same images, in turn.

    Args:
        folder: where stores are built, and removed again.
        info: of the store, but for its images.
        codec: of the store.
        source: of the images.
        entries: of which some are taken, as many as the teacher's speed allows.
        teacher: on its device.
        loading: how images are loaded and fed; the bare teacher gets batches of the same size.
        rounds: to be timed.

    Returns:
        `teacher_images_per_second` and `tokenize_images_per_second`, with the slowest and the fastest round of each, and their
        `ratio`; `images` a round, and the `workers` that decoded.
    """
    chosen = evenly(entries, _affordable(teacher, info.middle_size, info.channels, loading.batch_size))
    info = replace(info, parts=(begin_store(folder / "0", source, chosen),))
    ready = _ready(StoreImages.of_store(folder / "0", info, {0: source}), teacher, loading)
    images = sum(len(pixels) for pixels in ready)

    def build(number: int) -> float:
        store = folder / str(number)
        begin_store(store, source, chosen)
        writer, reader = StoreWriter(store, info), StoreImages.of_store(store, info, {0: source})
        progress = Progress("", "images", total=images, quiet=True)
        seconds = seconds_of(lambda: fill(writer, codec, range(info.shards), reader, teacher, loading, progress))
        shutil.rmtree(store)
        return seconds

    seconds = interleave(
        {
            "teacher": lambda _: seconds_of(lambda: finished([teacher(pixels) for pixels in ready][-1])),
            "tokenize": build,
        },
        rounds,
    )
    bare, whole = (Rate.of(images, seconds[name]) for name in ("teacher", "tokenize"))
    return {
        **bare.to_json("teacher_images_per_second"),
        **whole.to_json("tokenize_images_per_second"),
        "ratio": round(whole.median / bare.median, 3),
        "images": images,
        "codec": info.codec,
        "workers": worker_count(loading.workers),
    }


def _affordable(teacher: Teacher, size: int, channels: int, batch_size: int) -> int:
    """Images in whole batches, two at least, that the teacher does in about `SECONDS`."""
    batch = torch.zeros(batch_size, channels, size, size, dtype=torch.uint8, device=teacher.mean.device)
    finished(teacher(batch))
    batches = round(SECONDS / seconds_of(lambda: finished(teacher(batch))))
    return batch_size * max(2, min(batches, MOST // batch_size))


def _ready(images: StoreImages, teacher: Teacher, loading: Loading) -> list[torch.Tensor]:
    """The decoded images' pixels, uint8 [n, K, S, S] a batch, on the teacher's device."""
    batches = [places for shard in range(images.info.shards) for places in images.batches_of(shard, loading.batch_size)]
    loaded = images.load(batches, min(worker_count(loading.workers), len(batches)))
    decoded = [[image.pixels for _, image in batch if isinstance(image, MiddleImage)] for batch in loaded]
    return [torch.stack(pixels).to(teacher.mean.device) for pixels in decoded if pixels]

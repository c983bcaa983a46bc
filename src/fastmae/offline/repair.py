"""`fastmae verify --repair`: restore the damaged files of a store to the bytes that were there.

Small files come from their copies or are listed again. Shards come from `fill.build_shards`, as in `tokenize`, out of
the images and the teacher that the store names. A damaged shard may hold many sound records, so it stays in its place
until its successor is complete, and a repair is refused before it touches a shard if it could not make the same one.
"""

import logging
import shutil
from functools import partial
from pathlib import Path

import xxhash

from fastmae.config import VerifyConfig
from fastmae.errors import InputError
from fastmae.images.sources import open_source
from fastmae.offline.fill import build_shards, count_images, stored_codec
from fastmae.offline.listing import restore_list
from fastmae.offline.middle_images import DecodedBatch, ImageRange, LoaderOptions, MiddleImages
from fastmae.runtime.device import own_device
from fastmae.runtime.durable import write_whole
from fastmae.runtime.progress import Progress, counted_through
from fastmae.runtime.wording import counted
from fastmae.teachers.factory import teacher_of_store
from fastmae.tokens.audit import Damage, description_of
from fastmae.tokens.format import (
    CODEBOOKS_COPY,
    CODEBOOKS_FILE,
    MANIFEST_FILE,
    PIXELS,
    STORE_FILE,
    StoreInfo,
    list_name,
    shard_path,
)
from fastmae.tokens.manifest import Manifest, store_text
from fastmae.tokens.shard import MappedShard
from fastmae.tokens.shard_file import as_bytes
from fastmae.tokens.shard_header import ShardHeader
from fastmae.tokens.writer import StoreWriter

log = logging.getLogger(__name__)

SHOWN_IMAGES = 20
KINDS_WITH_LOCATIONS = ("tar", "datasets")
"""Kinds of sources whose image lists also say where in an archive each image lies."""


def repair(config: VerifyConfig, folder: Path, damage: list[Damage]) -> None:
    """Restore the damaged files of a store, and build the shards that are damaged or missing.

    Args:
        config: options of `verify`.
        folder: store of one middle size.
        damage: what `audit` found there.

    Raises:
        InputError: something can't be made again. All shards are then as they were.
    """
    info, files = description_of(folder), {damaged.file for damaged in damage}
    if STORE_FILE in files:
        write_whole(folder / STORE_FILE, lambda temporary: temporary.write_text(store_text(info), encoding="utf-8"))
    _restore_codebooks(folder, files)
    _restore_lists(folder, info, files, set())  # first, as they tell how many shards there can be
    writer = StoreWriter(folder, info)
    damaged_shards = {damaged.shard for damaged in damage if damaged.shard is not None}
    shards = sorted(damaged_shards.union(writer.missing_shards()))
    _restore_lists(folder, info, set(), {info.part_of(shard)[0] for shard in shards})
    manifest = _read_manifest(folder)
    if shards:
        _rebuild(config, writer, shards)
    writer.finish()
    if shards:
        _report(folder, shards, before=manifest)


def _restore_codebooks(folder: Path, files: set[str]) -> None:
    if {CODEBOOKS_FILE, CODEBOOKS_COPY} <= files:
        raise InputError(
            f"{folder}: {CODEBOOKS_FILE} and its copy are both damaged, and no token can be read without; "
            "tokenize again"
        )
    for damaged, sound in ((CODEBOOKS_FILE, CODEBOOKS_COPY), (CODEBOOKS_COPY, CODEBOOKS_FILE)):
        if damaged in files:
            write_whole(folder / damaged, partial(shutil.copyfile, folder / sound))


def _restore_lists(folder: Path, info: StoreInfo, files: set[str], parts_to_read: set[int]) -> None:
    """List images again where a list is damaged or missing, or where an archive may have been packed anew."""
    for number, part in enumerate(info.parts):
        is_damaged = list_name(number) in files or not (folder / list_name(number)).exists()
        if is_damaged or (number in parts_to_read and part.kind in KINDS_WITH_LOCATIONS):
            restore_list(folder, info, number)


def _rebuild(config: VerifyConfig, writer: StoreWriter, shards: list[int]) -> None:
    """Build shards from the teacher and the images that the store names, once it is sure that these are the same.

    Raises:
        InputError: the teacher's weights or some images have changed.
    """
    info, folder = writer.info, writer.folder
    teacher = teacher_of_store(info.teacher, info.middle_size, info.grid, folder, config.teacher)
    teacher = teacher.to(own_device(config.device))
    if teacher.token_dim != info.token_dim:
        made = f"makes tokens of {counted(teacher.token_dim, 'channel')}, not {info.token_dim}"
        raise InputError(f"{folder}: its teacher {made}, so its shards can't be made again; tokenize again")
    codec = stored_codec(folder, info)
    parts = sorted({info.part_of(shard)[0] for shard in shards})
    images = MiddleImages.of_store(folder, info, {part: open_source(Path(info.parts[part].source)) for part in parts})
    options = LoaderOptions(config.batch_size, config.workers)
    _check_images(images, folder, shards, options)
    with Progress("repair", "images", total=count_images(info, shards)) as progress:
        build_shards(writer, codec, shards, images, teacher, options, progress)


def _check_images(images: MiddleImages, folder: Path, shards: list[int], options: LoaderOptions) -> None:
    """Check that the images of damaged shards are those that were there, by the checksum of each image's pixels.

    Raises:
        InputError: some have changed. Rebuilding their shards would also overwrite sound records of these images.
    """
    expected: dict[str, int | None] = {}
    ranges: list[ImageRange] = []
    for shard in shards:
        checksums = _pixel_checksums(shard_path(folder, shard), images.info, shard)
        if checksums:
            expected |= checksums
            ranges += images.batches_of(shard, options.batch_size)
    changed: list[str] = []
    batches = images.load(ranges, options.workers)
    for batch in counted_through(batches, "compare the images", "batches", len(ranges)):
        actual = _checksums_of(batch)
        changed += [image.key for image in batch.images if actual.get(image.key) != expected[image.key]]
    if changed:
        names = ", ".join(changed[:SHOWN_IMAGES]) + (", ..." if len(changed) > SHOWN_IMAGES else "")
        raise InputError(
            f"{folder}: {counted(len(changed), 'image')} changed since ({names}); bring them back, or tokenize again"
        )


def _pixel_checksums(file: Path, info: StoreInfo, shard: int) -> dict[str, int | None]:
    """Checksum of the stored pixels of each image of a shard, None for a skipped image, by the image's key.

    Empty for a shard in which no record can be read any more: the file is missing or was renamed, or its header or its
    table of checksums is damaged.
    """
    try:
        checksums, header = MappedShard(file, info, shard, None).record_checksums, ShardHeader.from_file(file)
    except InputError:
        return {}
    return {image.path: int(checksums[image.row, PIXELS]) if image.row >= 0 else None for image in header.images}


def _checksums_of(batch: DecodedBatch) -> dict[str, int]:
    """Checksum of the stored pixels of each image that was decoded, by its key."""
    digests = (xxhash.xxh3_64_intdigest(as_bytes(pixels.numpy())) for pixels in batch.stored_pixels())
    return dict(zip(batch.decoded_keys, digests, strict=True))


def _read_manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.read(folder / MANIFEST_FILE)
    except InputError:
        return None


def _report(folder: Path, shards: list[int], before: Manifest | None) -> None:
    """Say how many shards were built, and how many of them have the bytes that the old manifest lists."""
    after = Manifest.read(folder / MANIFEST_FILE)
    outcome = ""
    if before is not None and len(before.shards) == len(after.shards):
        same = sum(before.shards[shard] == after.shards[shard] for shard in shards)
        outcome = f", {same} of them to the same bytes"
    log.info(f"{folder}: {counted(len(shards), 'shard')} made again{outcome}")

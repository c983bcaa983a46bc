"""`fastmae tokenize`: a folder, list or archive of images and a teacher in, a token store out (Sec. 3.2).

Here: the options, which images are to be in the store, how much it will take. The work itself is `offline`'s.
"""

import shutil
import time
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from torch import nn

from fastmae.config import TokenizeConfig
from fastmae.errors import InputError, InterruptedRunError
from fastmae.images.image_list import ImageList
from fastmae.offline.estimate import (
    SAMPLED,
    bytes_per_image,
    check_disk,
    codebook_bytes,
    measure_sample,
    nearest_folder,
)
from fastmae.offline.fill import LoaderOptions, MiddleImages, build_shards, sample_tokens
from fastmae.offline.inspect import store_summary, summary_over_scales
from fastmae.offline.listing import ListedImages, check_lists, keep_list, listed_images, sources_of
from fastmae.runtime.device import memory_hint, own_device
from fastmae.runtime.durable import holds_anything, write_json
from fastmae.runtime.processes import this_process
from fastmae.runtime.progress import Progress, duration
from fastmae.runtime.workers import worker_count
from fastmae.teachers import Teacher
from fastmae.teachers.factory import load_network
from fastmae.tokens import TokenStore
from fastmae.tokens.codec import Codec, learns, load_codec, parse_codec
from fastmae.tokens.format import (
    CODEBOOKS_COPY,
    CODEBOOKS_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    SCALES_FILE,
    STORE_FILE,
    Part,
    StoreInfo,
    list_name,
    read_store_info,
    shard_path,
)
from fastmae.tokens.manifest import Manifest, load_tensors
from fastmae.tokens.quantise import learn_from
from fastmae.tokens.writer import StoreWriter, begin_folder

SHOWN_SKIPS = 20


def tokenize(config: TokenizeConfig) -> dict[str, Any]:
    """Build a store, a process's part of one, extend or continue either; the command's JSON."""
    sizes = middle_sizes(config)
    _check(config)
    rank, world_size = _share(config)
    folders = [config.store / str(size) for size in sizes] if len(sizes) > 1 else [config.store]
    load = cache(partial(load_network, config.teacher, config.teacher_weights))  # once, and after the images were found
    if config.dry_run:
        with listed_images(config.images, config.add, folders[0]) as listed:
            return _dry_run(config, sizes, listed, load())
    summaries = []
    for size, folder in zip(sizes, folders, strict=True):
        with listed_images(config.images, config.add, folder) as listed:
            network = deepcopy(load())
            if len(sizes) > 1:
                _begin_scales(config.store, sizes)
                print(f"middle size {size}:")
            summaries.append(_tokenize(config, size, folder, listed, network, rank, world_size, like=folders[0]))
    return summaries[0] if len(sizes) == 1 else summary_over_scales(summaries)


def _tokenize(
    config: TokenizeConfig,
    size: int,
    folder: Path,
    listed: ListedImages,
    network: tuple[nn.Module, str | None],
    rank: int,
    world_size: int,
    like: Path,
) -> dict[str, Any]:
    """The store of one middle size; `like` is that of the smallest, whose codebooks all share."""
    teacher = _teacher(config, size, network)
    if not (folder / STORE_FILE).exists():  # all that can be refused is refused before anything is written
        info = _store_info(config, size, teacher, (listed.part,))
        check_disk(folder, MiddleImages(info, {0: ImageList(listed.file)}, {0: listed.source}), info.images)
    writer = _open_writer(config, size, folder, listed, teacher)
    loading = LoaderOptions(config.batch_size, config.workers, config.strict)
    share = range(rank, writer.info.shards, world_size)
    missing = [shard for shard in writer.missing_shards() if shard in share]
    images = MiddleImages.of_store(folder, writer.info, sources_of(listed, writer.info, missing))
    wanted, left = (sum(len(writer.info.part_of(shard)[1]) for shard in shards) for shards in (share, missing))
    _announce(config, teacher, writer.info.images, share, world_size)
    if left and left < writer.info.images:
        check_disk(folder, images, left)
    begun = time.monotonic()
    try:
        smaller = memory_hint(f"give --batch-size {max(1, config.batch_size // 2)}, and the same call continues")
        with smaller:
            codec = _codec(config, writer, images, teacher, loading, like) if missing else None
            if codec is None:
                print(f"{folder}: nothing left to do")
            else:
                with Progress("tokenize", "images", total=wanted, done=wanted - left) as progress:
                    begun = time.monotonic()
                    build_shards(writer, codec, missing, images, teacher, loading, progress)
    except KeyboardInterrupt as stop:
        raise InterruptedRunError("interrupted; finished shards are kept, and the same call continues") from stop
    rate = round(left / (time.monotonic() - begun), 2) if left else None
    others = writer.missing_shards()
    if others:
        print(f"{folder}: this process's {len(share)} shards are done; {len(others)} of others are still to come")
        return _summary_of_share(writer, share, rate)
    if missing or not writer.finished:
        writer.finish()
    store = TokenStore(folder)
    _name_skipped(store)
    summary = store_summary(store, images_per_second=rate)
    megabytes, kilobytes = summary["bytes"] / 1e6, summary["bytes_per_image"] / 1e3
    print(f"{folder}: {len(store)} images, {store.skipped} skipped, {megabytes:.1f} MB ({kilobytes:.1f} kB an image)")
    return summary


def _open_writer(config: TokenizeConfig, size: int, folder: Path, listed: ListedImages, teacher: Teacher) -> StoreWriter:
    """The store's writer, with the images asked for in its lists.

    Raises:
        InputError: a folder or a store that does not go with the options, or a damaged one.
    """
    begin_folder(folder)
    begun = read_store_info(folder).parts if (folder / STORE_FILE).exists() else ()
    asked = listed.part
    if config.add:
        return _open_to_add(config, size, folder, listed, teacher, begun)
    if len(begun) > 1 and str(listed.source.path) not in {part.source for part in begun}:
        raise InputError(
            f"{folder}: holds other images than {config.images}; give --add to take these in too, or another folder"
        )
    if not begun:
        keep_list(listed, folder / list_name(0))
    writer = StoreWriter(folder, _store_info(config, size, teacher, begun if len(begun) > 1 else (asked,)))
    if (
        len(begun) == 1 and writer.missing_shards()
    ):  # where the images lie in their archive may have changed, or the list be damaged
        keep_list(listed, folder / list_name(0))
    check_lists(folder, writer.info)
    return writer


def _open_to_add(
    config: TokenizeConfig, size: int, folder: Path, listed: ListedImages, teacher: Teacher, begun: tuple[Part, ...]
) -> StoreWriter:
    writer, asked = StoreWriter(folder, _store_info(config, size, teacher, begun)), listed.part
    check_lists(folder, writer.info)
    if not asked.images or (len(begun) > 1 and begun[-1] == asked and writer.missing_shards()):
        return writer
    if writer.missing_shards():
        raise InputError(f"{folder}: the store is not finished; give the same `fastmae tokenize` without --add first")
    if (folder / MANIFEST_FILE).exists():  # what is damaged now would be taken for sound by the new manifest
        Manifest.read(folder / MANIFEST_FILE).check_all(folder)
    keep_list(listed, folder / list_name(len(begun)))
    writer.extend(asked)
    return writer


def _codec(
    config: TokenizeConfig, writer: StoreWriter, images: MiddleImages, teacher: Teacher, loading: LoaderOptions, like: Path
) -> Codec:
    """The store's codec: learnt from a sample where it has to be, once, and then read back by every process."""
    info, file = writer.info, writer.folder / CODEBOOKS_FILE
    if not learns(info.codec):
        return load_codec(info.codec, info.token_dim, {})
    for copy in (writer.folder / CODEBOOKS_COPY, like / CODEBOOKS_FILE):
        if not file.exists() and copy.exists():
            writer.keep_codebooks(load_codec(info.codec, info.token_dim, load_tensors(copy)))
    if not file.exists():
        if len(writer.missing_shards()) < info.shards:
            raise InputError(
                f"{file}: is gone, and the shards that are there can't be read without; bring it back, or take another folder"
            )
        count = min(config.codec_images, info.parts[min(images.sources)].images)
        total = sum(len(places) for _, places in images.evenly_spaced(count, loading.batch_size))
        with Progress(f"learn {info.codec}", "images", total=total) as shown:
            tokens, means = sample_tokens(images, teacher, loading, count, config.seed, shown)
        writer.keep_codebooks(learn_from(info.codec, tokens, means, config.seed))
    return load_codec(info.codec, info.token_dim, load_tensors(file))


def _dry_run(
    config: TokenizeConfig, sizes: list[int], listed: ListedImages, network: tuple[nn.Module, str | None]
) -> dict[str, Any]:
    """Measure on a sample how big the store will be and how long it will take; nothing is written."""
    images, total, seconds, per_image, books = listed.info.images, 0.0, 0.0, 0.0, 0
    if not images:
        raise InputError(f"{config.images}: holds nothing that the store does not hold already")
    for size in sizes:
        teacher = _teacher(config, size, deepcopy(network))
        info = _store_info(config, size, teacher, (listed.part,))
        sample = MiddleImages(info, {0: ImageList(listed.file)}, {0: listed.source})
        loading = LoaderOptions(config.batch_size, config.workers, config.strict)
        measured = measure_sample(sample, teacher, loading, min(SAMPLED, images))
        size_each = bytes_per_image(info, measured.pixel_bytes)
        per_image += size_each
        total += size_each * measured.decoded * images
        books += 0 if config.add else codebook_bytes(info)
        seconds += images / measured.images_per_second
    free = shutil.disk_usage(nearest_folder(config.store)).free
    total += books
    learnt = f" and {books / 1e6:.1f} MB of codebooks" if books else ""
    print(
        f"{images} images x {per_image / 1e3:.1f} kB{learnt} = {total / 1e9:.3g} GB ({config.codec} tokens, {config.pixels} pixels), "
        f"{'MORE THAN' if total > free else 'of'} the {free / 1e9:.3g} GB that are free at {config.store}; about {duration(seconds)} on "
        f"this {own_device(config.device).type} alone, {images / seconds:.1f} images/s; measured on {min(SAMPLED, images)} of them; "
        "nothing was written"
    )
    return {
        "images": images, "skipped": 0, "grid": sizes[0] // config.patch_size, "token_dim": info.token_dim, "bytes": round(total),
        "bytes_per_image": round(per_image), "images_per_second": round(images / seconds, 2), "seconds": round(seconds, 1), "free": free,
    }  # fmt: skip


def _teacher(config: TokenizeConfig, size: int, network: tuple[nn.Module, str | None]) -> Teacher:
    model, weights_file = network
    return Teacher(
        config.teacher, model, size, size // config.patch_size,
        config.teacher_block, config.teacher_norm, config.teacher_size, config.teacher_last, weights_file,
        teacher_channels(config),
    ).to(own_device(config.device))  # fmt: skip


def middle_sizes(config: TokenizeConfig) -> list[int]:
    """`--middle-size`, smallest first.

    Raises:
        InputError: no whole numbers, or not made of whole patches.
    """
    given = str(config.middle_size)
    try:
        sizes = sorted({int(size) for size in given.split(",")})
    except ValueError as error:
        raise InputError(
            f"--middle-size {given}: give a number of pixels, or several with commas between them, as 256,352,448"
        ) from error
    patch = config.patch_size
    for size in sizes:
        if patch < 1 or size < patch or size % patch:
            near = max(1, round(size / max(1, patch))) * max(1, patch)
            raise InputError(f"--middle-size {size}: not a multiple of --patch-size {patch}; take {near}")
    return sizes


def teacher_channels(config: TokenizeConfig) -> tuple[int, ...]:
    """`--teacher-channels`: which channel the teacher takes as red, green and blue.

    Raises:
        InputError: not three of the channels, or none named for images that are neither RGB nor grey.
    """
    if not config.teacher_channels:
        if config.channels not in (1, 3):
            raise InputError(
                f"--channels {config.channels}: say which of them the teacher sees as red, green and blue: --teacher-channels 0,1,2"
            )
        return (0, 1, 2) if config.channels == 3 else (0, 0, 0)
    try:
        chosen = tuple(int(channel) for channel in config.teacher_channels.split(","))
    except ValueError:
        chosen = ()
    if len(chosen) != 3 or not all(0 <= channel < config.channels for channel in chosen):
        raise InputError(
            f"--teacher-channels {config.teacher_channels}: give three numbers from 0 to {config.channels - 1}, as 0,1,2"
        )
    return chosen


def _begin_scales(folder: Path, sizes: list[int]) -> None:
    file = folder / SCALES_FILE
    if file.exists():
        begun = [store.name for store in sorted(folder.iterdir()) if store.is_dir()]
        if set(begun) - {str(size) for size in sizes}:
            raise InputError(
                f"{folder}: was begun with --middle-size {','.join(begun)}; give it again, or another folder"
            )
    elif folder.exists() and (not folder.is_dir() or holds_anything(folder)) and not file.exists():
        raise InputError(
            f"{folder}: exists and is not a token store of several sizes; give a folder that is new or empty"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, {"sizes": sizes})


def _check(config: TokenizeConfig) -> None:
    if config.channels < 1:
        raise InputError(f"--channels {config.channels}: give 1 or more")
    teacher_channels(config)
    if config.pixels == "jpeg" and config.channels not in (1, 3):
        raise InputError(f"--channels {config.channels}: a JPEG holds 1 or 3; take --pixels raw")
    if not 1 <= config.jpeg_quality <= 100:
        raise InputError(f"--jpeg-quality {config.jpeg_quality}: give 1 to 100")
    for name in ("shard_size", "batch_size"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: give 1 or more")
    if config.codec_images < 1:
        raise InputError(f"--codec-images {config.codec_images}: give 1 or more")
    parse_codec(config.codec)
    worker_count(config.workers)
    if not str(config.store.absolute()).isprintable():
        raise InputError(
            f"{str(config.store)!r}: safetensors and Parquet take no such path; give one in UTF-8 without control characters"
        )
    if config.images.is_dir() and config.store.resolve().is_relative_to(config.images.resolve()):
        raise InputError(f"{config.store}: lies inside the images' folder; take a place outside {config.images}")


def _store_info(config: TokenizeConfig, size: int, teacher: Teacher, parts: tuple[Part, ...]) -> StoreInfo:
    return StoreInfo(
        teacher=teacher.describe(),
        token_dim=teacher.token_dim,
        middle_size=size,
        patch_size=config.patch_size,
        channels=config.channels,
        resize=config.resize,
        codec=config.codec,
        flips=config.flips,
        pixels=config.pixels,
        jpeg_quality=config.jpeg_quality if config.pixels == "jpeg" else 0,
        shard_size=config.shard_size,
        parts=parts,
    )


def _share(config: TokenizeConfig) -> tuple[int, int]:
    """(rank, world size), from the flags, or as torchrun or srun has started this process."""
    rank, world_size = config.rank, config.world_size
    if rank is None and world_size is None:
        rank, world_size = this_process().rank, this_process().world_size
    if rank is None or world_size is None:
        raise InputError("--rank and --world-size go together; give both or neither")
    if not 0 <= rank < world_size:
        raise InputError(f"--rank {rank}: give 0 to {world_size - 1} for --world-size {world_size}")
    return rank, world_size


def _announce(config: TokenizeConfig, teacher: Teacher, images: int, share: range, world_size: int) -> None:
    averaged = f" and {teacher.last - 1} before it" if teacher.last > 1 else ""
    part = f"; {len(share)} of its shards here, {world_size} processes" if world_size > 1 else ""
    print(
        f"teacher {teacher.spec}, block {teacher.block}{averaged}, norm {teacher.norm}, looks at {teacher.input_size} px; "
        f"{images} images -> {teacher.grid} x {teacher.grid} tokens of {teacher.token_dim} ({config.codec}){part}"
    )


def _name_skipped(store: TokenStore) -> None:
    if not store.skipped:
        return
    rows: list[dict[str, str]] = []
    with store.files.path(INDEX_FILE).open("rb") as file:  # a part at a time: it may list millions
        for part in pq.ParquetFile(file).iter_batches(columns=["path", "status"], use_threads=False):
            if len(rows) < SHOWN_SKIPS:
                rows += part.filter(pa.compute.not_equal(part["status"], "ok")).to_pylist()
    print(f"skipped {store.skipped} of {store.info.images} files:")
    for row in rows[:SHOWN_SKIPS]:
        print(f"  {row['path']}: {row['status']}")
    if store.skipped > SHOWN_SKIPS:
        print(
            f"  ... and {store.skipped - SHOWN_SKIPS} more; all are in {store.folder / 'index.parquet'}, column status"
        )


def _summary_of_share(writer: StoreWriter, share: range, images_per_second: float | None) -> dict[str, Any]:
    """The JSON of a process that finished before the others."""
    records = [image for shard in share for image in writer.header(shard).images]
    decoded = sum(image.row >= 0 for image in records)
    size = sum(shard_path(writer.folder, shard).stat().st_size for shard in share)
    return {
        "images": decoded,
        "skipped": len(records) - decoded,
        "grid": writer.info.grid,
        "token_dim": writer.info.token_dim,
        "bytes": size,
        "bytes_per_image": round(size / max(1, decoded)),
        "images_per_second": images_per_second,
        "finished": False,
    }
